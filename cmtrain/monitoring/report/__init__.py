"""Draw a run folder as one HTML file."""
