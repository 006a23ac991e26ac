"""Text within XML and HTML."""

from __future__ import annotations

import html
import re

NOT_IN_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def legal(text: str) -> str:
    """Without characters that XML has no way to write."""
    return NOT_IN_XML.sub("\ufffd", text)


def escape(text: str) -> str:
    """A text that stands for itself, between tags and in quoted attributes.

    >>> escape('<a href="b">')
    '&lt;a href=&quot;b&quot;&gt;'
    """
    return html.escape(legal(text))
