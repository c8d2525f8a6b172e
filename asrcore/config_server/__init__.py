"""The configuration server: the API over HTTPS, its web server, metrics."""
