"""Installing the mobility service on a server."""
