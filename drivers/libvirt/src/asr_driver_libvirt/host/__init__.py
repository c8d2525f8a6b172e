"""One libvirt host: the connection, its errors and events, power, volumes, NVRAM."""
