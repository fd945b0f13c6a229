"""The page: one HTML file that needs nothing else, runs no script but its own, and shows any text as text."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from importlib.resources import files
from typing import Any

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#main">To the content</a>
{body}
<div id="card" role="tooltip" hidden></div>
<script>{script}</script>
</body>
</html>
"""


def page(title: str, body: str) -> str:
    """`body` (already escaped) as a page. Scripts and styles other than the page's own are forbidden by their hash."""
    style, script = (_asset(name) for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return PAGE.format(policy=policy, title=text(title), style=style, body=body, script=script)


def text(value: Any) -> str:
    """Any value as HTML text or attribute."""
    return html.escape(str(value), quote=True)


def embedded(value: Any) -> str:
    """JSON that can stand inside a script element: no `<`, `>`, `&`, and no line separators that end a line."""
    found = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        found = found.replace(character, f"\\u{ord(character):04x}")
    return found


def _asset(name: str) -> str:
    return "\n" + (files("tokenpo.report") / "assets" / name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
