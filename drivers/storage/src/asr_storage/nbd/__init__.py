"""An NBD client on libnbd: many requests in flight, block status, TLS."""
