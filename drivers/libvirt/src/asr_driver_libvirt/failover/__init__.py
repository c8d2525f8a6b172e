"""Machines made from recovery points: test, promotion, undo, commit."""
