"""Replicas in page blobs: cycles, seals, recovery points."""
