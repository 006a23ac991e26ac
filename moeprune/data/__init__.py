"""Data specs into batches."""
