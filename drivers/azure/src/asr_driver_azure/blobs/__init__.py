"""Page blobs: the container, ranges, uploads, VHD footers, records."""
