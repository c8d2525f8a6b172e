"""Views of a server's disks through its mobility service."""
