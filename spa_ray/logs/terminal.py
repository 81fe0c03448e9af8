"""Text of models and data as a terminal may show it: control characters become visible escapes.

A raw escape sequence can rewrite what stands on the screen, set its title or fill the clipboard; a right-to-left
override can make one file name look like another. Never: a change of what is stored.
"""

from __future__ import annotations

import json
import re
from typing import Any

# C0 but tab and line feed, DEL and C1; line and paragraph separators, bidirectional marks, lone surrogates.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text with each unsafe character written as its escape, `\\x1b` for example. Idempotent."""
    return _UNSAFE.sub(_escape, text)


def printable_json(value: Any, *, ascii_only: bool = False) -> str:
    """One line of JSON that parses to the same value and holds no unsafe character."""
    text = json.dumps(value, ensure_ascii=ascii_only)
    return _UNSAFE.sub(lambda m: f"\\u{ord(m[0]):04x}", text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
