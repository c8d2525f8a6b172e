"""Checkpoints, backup jobs and frozen views of running machines."""
