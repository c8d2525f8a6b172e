"""A replica in a directory: journal, images, recovery points."""
