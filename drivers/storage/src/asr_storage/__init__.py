"""What drivers that keep replicas in files share; not a driver itself."""
