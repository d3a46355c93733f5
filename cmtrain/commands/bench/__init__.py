"""Measure how fast loader, model and guard are, and what limits them."""
