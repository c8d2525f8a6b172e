"""Resources of interrupted runs, found and deleted."""
