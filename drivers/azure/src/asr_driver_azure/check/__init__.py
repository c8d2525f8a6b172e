"""`asr driver check azure`: tries the driver in a subscription."""
