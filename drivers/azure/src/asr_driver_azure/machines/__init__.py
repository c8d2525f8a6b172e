"""Machines and managed disks made from recovery points."""
