"""Azure's management service as far as the driver uses it, strict, with disks in files and machines in QEMU."""
