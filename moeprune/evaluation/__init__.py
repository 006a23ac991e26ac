"""Metrics, intervals, gates and latency."""
