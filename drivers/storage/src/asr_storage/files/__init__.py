"""Durable and sparse files, and the errors of storage."""
