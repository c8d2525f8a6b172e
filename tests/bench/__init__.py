"""`make bench`: asrcore measured side by side with the tools in common use."""
