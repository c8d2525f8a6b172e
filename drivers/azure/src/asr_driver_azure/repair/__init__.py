"""What a Linux system disk needs to boot in Azure."""
