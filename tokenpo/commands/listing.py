"""`tokenpo methods`: what there is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tokenpo import methods

PAGES = "docs/methods.md"
NOTHING_MORE = {
    "estimator": "rewards and groups only",
    "shaper": "advantages and rewards only",
    "filter": "advantages and rewards only",
}
"""What a method of a kind reads that declares no needs; log-probs for the others."""


def needs_of(kind: str, needs: Sequence[str]) -> str:
    """The needs of a method in words."""
    return ", ".join(needs) or NOTHING_MORE.get(kind, "log-probs only")


def rows() -> list[dict[str, Any]]:
    """Every registered method as plain data."""
    return [
        {
            "name": m.name,
            "kind": m.kind,
            "summary": m.summary,
            "title": m.title,
            "paper": m.paper,
            "needs": list(m.needs),
            "defaults": m.defaults,
            "page": f"{PAGES}#{m.name}",
            "function": f"{m.function.__module__}.{m.function.__name__}",
        }
        for m in methods.all_methods().values()
    ]


def show(as_json: bool = False) -> None:
    """Print the methods, by kind, or all of them as JSON."""
    found = rows()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for kind in sorted({row["kind"] for row in found}):
        print(f"{kind}")
        for row in (r for r in found if r["kind"] == kind):
            defaults = " ".join(f"{k}={v}" for k, v in row["defaults"].items())
            print(f"  {row['name']:16} {row['summary']}")
            print(f"  {'':16} {row['title']}, {row['paper']}; {row['page']}")
            print(f"  {'':16} needs: {needs_of(row['kind'], row['needs'])};  defaults: {defaults or 'none'}")
        print()
