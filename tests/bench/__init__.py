"""`make bench`: what asrcore does, measured side by side with the tools people use today."""
