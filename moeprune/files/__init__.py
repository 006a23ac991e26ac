"""Bytes on disk: headers, shards, foreign files, atomic writes."""
