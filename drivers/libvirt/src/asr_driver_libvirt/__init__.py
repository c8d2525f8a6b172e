"""asrcore driver for libvirt/KVM sites."""
