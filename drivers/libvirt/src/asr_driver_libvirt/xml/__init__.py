"""libvirt's XML, read and written; pure."""
