"""What runs for long: the replication service of `asr run`."""
