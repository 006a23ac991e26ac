"""Turn results into text, JSON, Markdown, CI formats and a page."""
