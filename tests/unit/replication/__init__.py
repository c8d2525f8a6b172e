"""Tests of asrcore.replication."""
