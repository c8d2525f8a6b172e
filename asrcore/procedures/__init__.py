"""What a person starts, as durable steps: protect, replicate, verify, fail over, undo, commit, re-protect."""
