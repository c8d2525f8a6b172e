"""Tests of asrcore.model."""
