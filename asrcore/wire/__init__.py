"""What travels between processes: frames, channel, TLS."""
