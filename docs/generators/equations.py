"""Equations: LaTeX in a page becomes MathML, which browsers lay out by themselves, without a script or the network.

A block is fenced as ``math``; in a sentence an equation stands between dollars. Both are what GitHub shows too.
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)


def block(source: str, language: str, css_class: str, options: Any, md: Any, **rest: Any) -> str:
    """An equation a line, one below the other; what pymdownx.superfences calls for a fence."""
    lines = [line for line in source.splitlines() if line.strip()]
    return "".join(f'<div class="{css_class}">{convert(line, display="block")}</div>' for line in lines)


def inline(page: str) -> str:
    """The HTML of a page with what pymdownx.arithmatex found in its sentences as MathML."""
    return _INLINE.sub(lambda match: str(convert(html.unescape(match[1]))), page)
