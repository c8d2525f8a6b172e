"""A plug-in for asrcore: events as JSON, posted to a URL."""
