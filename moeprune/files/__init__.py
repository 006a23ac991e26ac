"""Bytes on disk: headers, shards, foreign files, whole-or-nothing writes, streaming."""
