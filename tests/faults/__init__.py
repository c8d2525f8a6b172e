"""Faults that cross several parts: each was seen, and each has a test that failed before."""
