"""QEMU's tools as child processes: qemu-img, qemu-nbd, their run directory."""
