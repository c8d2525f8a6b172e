"""Calls of Azure: clients, pacing, retries, errors, sizes."""
