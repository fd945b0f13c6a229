"""A report as one HTML file: heat maps of tokens, curves, tables and facts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenpo.report.page import embedded, page, text
from tokenpo.report.views import Group, Panel, Report, Response, Table, limit, piece_values, pieces, printable

LONG_PROMPT = 400
"""Characters; a longer prompt is folded."""
HINT = (
    "Point at a token, tap it, or move through a response with the arrow keys. Stacked stripes stand in the order of "
    "the scales above, from the top."
)


def write_html(report: Report, path: Path | str) -> Path:
    """Write `render(report)`; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_text(render(report), encoding="utf-8")
    draft.rename(path)
    return path


def render(report: Report) -> str:
    """The page as a string; the same report gives the same bytes."""
    parts = [_head(report), '<main id="main">']
    parts += [_table(table) for table in report.tables]
    if report.panels:
        parts.append(_curves(report.panels))
    if report.groups:
        parts.append('<div id="tokens">')
        parts.append(_bar(report) if report.layers else "")
        parts.append('<section aria-labelledby="h-tokens"><h2 id="h-tokens">Token by token</h2>')
        if report.layers:
            parts.append(f'<p class="hint">{HINT}</p>')
        parts += [_group(report, group, f"g{i}") for i, group in enumerate(report.groups)]
        parts.append("</section></div>")
    if report.samples:
        parts.append('<section aria-labelledby="h-samples"><h2 id="h-samples">What it writes</h2>')
        parts += [_group(report, group, f"s{i}") for i, group in enumerate(report.samples)]
        parts.append("</section>")
    if report.facts:
        parts.append(_facts(report.facts))
    parts.append("</main>")
    return page(report.title, "\n".join(parts))


def _head(report: Report) -> str:
    summary = f"<p>{text(printable(report.summary))}</p>" if report.summary else ""
    places = (
        ("h-curves", "Training", report.panels),
        ("h-tokens", "Token by token", report.groups),
        ("h-samples", "What it writes", report.samples),
        ("h-facts", "How this was made", report.facts),
    )
    links = "".join(f'<a href="#{name}">{label}</a>' for name, label, there in places if there)
    title = text(printable(report.title))
    return (
        f'<header class="top"><p class="eyebrow">tokenpo</p><h1>{title}</h1>{summary}'
        f'<nav aria-label="On this page">{links}</nav></header>'
    )


def _bar(report: Report) -> str:
    layers = [
        {
            "key": layer.key,
            "title": printable(layer.title),
            "unit": layer.unit,
            "signed": layer.signed,
            "note": printable(layer.note),
            "limit": float(f"{limit(report, layer.key):.3g}"),
            "shown": layer.shown,
        }
        for layer in report.layers
    ]
    chips = "".join(
        f'<button type="button" class="chip" data-layer="{i}" aria-pressed="false" title="{text(layer["note"])}">'
        f"{text(layer['title'])}</button>"
        for i, layer in enumerate(layers)
    )
    return (
        '<div class="bar" role="region" aria-label="Colours"><div class="chips" role="group" aria-label="Colour by">'
        f'{chips}<button type="button" class="switch" id="stack" aria-pressed="false">Stack</button></div>'
        '<div class="legends" id="legends" tabindex="0" role="group" aria-label="Scales"></div></div>'
        f'<script type="application/json" id="layers">{embedded(layers)}</script>'
    )


def _group(report: Report, group: Group, name: str) -> str:
    prompt = text(printable(group.prompt))
    if len(group.prompt) > LONG_PROMPT:
        first = text(printable(" ".join(group.prompt[:90].split())))
        prompt = f"<details><summary>{first} …</summary><div>{prompt}</div></details>"
    note = f'<span class="note">{text(printable(group.note))}</span>' if group.note else ""
    sides = "".join(_response(response, f"{name}r{i}") for i, response in enumerate(group.responses))
    data = ""
    if any(response.tokens for response in group.responses):
        found = embedded([_data(report, response) for response in group.responses])
        data = f'<script type="application/json" class="data">{found}</script>'
    return (
        f'<article class="group{" heat" if data else ""}" aria-labelledby="{name}">'
        f'<h3 id="{name}">Prompt {int(name[1:]) + 1}{note}</h3>'
        f'<div class="prompt" dir="auto">{prompt}</div><div class="sides">{sides}</div>{data}</article>'
    )


def _response(response: Response, name: str) -> str:
    count = f"{len(response.tokens)} tokens" if response.tokens else ""
    note = " · ".join(text(printable(part)) for part in (count, response.note) if part)
    label, shown = text(printable(response.label)), text(printable(response.text))
    return (
        f'<div class="side {_kind(response.label)}"><div class="label"><h4 id="{name}">{label}</h4>'
        f'<span class="note">{note}</span><span class="sums"></span></div>'
        f'<div class="text" dir="auto" role="group" aria-labelledby="{name}">{shown}</div></div>'
    )


def _kind(label: str) -> str:
    return label if label in ("chosen", "rejected", "before", "after") else "plain"


def _data(report: Report, response: Response) -> dict[str, Any]:
    """What the script needs of one response, short: lengths in UTF-16 units, as it counts.

    `n` lengths and `c` token counts of its runs (0: characters of no token), `s` run -> name of a token
    without characters, `v` layer -> one value a run that has tokens.
    """
    shown = printable(response.text)
    parts = pieces(response)
    runs: list[tuple[int, int]] = []
    names: dict[int, str] = {}
    place = 0
    for piece in parts:
        if piece.end:
            if piece.start > place:
                runs.append((_units(shown[place : piece.start]), 0))
            place = piece.end
        else:
            names[len(runs)] = printable(response.tokens[piece.first])
        runs.append((_units(shown[piece.start : piece.end]), piece.last - piece.first))
    if place < len(shown):
        runs.append((_units(shown[place:]), 0))
    values = {
        str(i): [_short(v) for v in piece_values(parts, response.values[layer.key])]
        for i, layer in enumerate(report.layers)
        if layer.key in response.values
    }
    return {"n": [n for n, _ in runs], "c": [c for _, c in runs], "s": names, "v": values}


def _units(characters: str) -> int:
    return len(characters) + sum(c > "\uffff" for c in characters)


def _short(value: float) -> float | int | None:
    """Four digits; None for what is no number."""
    if not math.isfinite(value):
        return None
    rounded = float(f"{value:.4g}")
    return int(rounded) if rounded == int(rounded) else rounded


def _curves(panels: Sequence[Panel]) -> str:
    data = [
        {
            "title": panel.title,
            "series": [
                {"name": name, "points": [[_short(x), _short(y)] for x, y in points if math.isfinite(y)]}
                for name, points in panel.series.items()
            ],
            "line": None if panel.line is None else [panel.line[0], _short(panel.line[1])],
        }
        for panel in panels
    ]
    figures = "".join(
        f'<figure class="curve" data-panel="{i}"><figcaption><span class="name">{text(panel.title)}</span>'
        '<span class="keys"></span></figcaption></figure>'
        for i, panel in enumerate(panels)
    )
    return (
        '<section aria-labelledby="h-curves"><div class="row"><h2 id="h-curves">Training</h2>'
        '<label class="slider">Smoothing <input id="smooth" type="range" min="0" max="0.98" step="0.02" value="0.6">'
        f'<output id="smoothed">0.60</output></label></div><div class="curves">{figures}</div>'
        f'<script type="application/json" id="panels">{embedded(data)}</script></section>'
    )


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{text(c)}</th>' if c else "<td></td>" for c in table.columns)
    rows = "".join(
        f'<tr><th scope="row">{text(printable(row[0]))}</th>'
        + "".join(f"<td>{text(printable(cell))}</td>" for cell in row[1:])
        + "</tr>"
        for row in table.rows
    )
    note = f'<p class="hint">{text(table.note)}</p>' if table.note else ""
    return (
        f"<section><h2>{text(table.title)}</h2>{note}"
        f'<div class="scroll" tabindex="0" role="group" aria-label="{text(table.title)}"><table><thead><tr>{head}</tr>'
        f"</thead><tbody>{rows}</tbody></table></div></section>"
    )


def _facts(facts: Mapping[str, Mapping[str, Any]]) -> str:
    parts = []
    for section, values in facts.items():
        rows = "".join(f"<dt>{text(printable(str(k)))}</dt><dd>{text(_fact(v))}</dd>" for k, v in values.items())
        parts.append(f'<div class="facts"><h3>{text(printable(section))}</h3><dl>{rows}</dl></div>')
    columns = f'<div class="columns">{"".join(parts)}</div>'
    return f'<section aria-labelledby="h-facts"><h2 id="h-facts">How this was made</h2>{columns}</section>'


def _fact(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (dict, list, tuple)):
        return printable(json.dumps(value, ensure_ascii=False, default=str))
    return printable(str(value))
