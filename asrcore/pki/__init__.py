"""Certificates: the authority, and how a component gets and renews its identity."""
