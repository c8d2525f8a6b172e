"""Replicas in a directory of the host."""
