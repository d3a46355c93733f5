"""Show a run: metrics, HTTP server, live page, console and trackers."""
