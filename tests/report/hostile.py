"""Strings that try to be more than text, and reports made of them."""

import random
from itertools import pairwise

from tokenpo.report import Group, Layer, Panel, Report, Response, Table

HOSTILE = [
    "<script>window.pwned=1</script>",
    "</script><script>window.pwned=1</script>",
    "<img src=x onerror=window.pwned=1>",
    '"><svg onload=window.pwned=1>',
    "' onmouseover='window.pwned=1",
    "<!--<script>",
    "-->",
    "]]>",
    "<style>*{display:none}</style>",
    "</style><script>window.pwned=1</script>",
    "</title><script>window.pwned=1</script>",
    "</div></article></main><h1>out</h1>",
    "<iframe srcdoc='<script>parent.pwned=1</script>'></iframe>",
    "<base href=//example.invalid/>",
    "<meta http-equiv=refresh content=0>",
    "<a href='javascript:window.pwned=1'>x</a>",
    "javascript:window.pwned=1",
    "&lt;b&gt; &amp; &#x3c; &copy",
    "{{7*7}} ${7*7} {0} %s {style}",
    "__proto__",
    "constructor",
    "a\u2028b\u2029c",
    "\x00\x01\x1b[31mred\x1b[0m\x07\r\nnew\x7f\x9b1m",
    "\u202eesrever\u202c \u2066isolate",
    "\ud800 half \udfff",
    "\ufffe\uffff\ufeff",
]
SCRIPTS = [
    "e\u0301 a\u0308\u0323 o\u0302\u0301",
    "👩‍👩‍👧‍👦 👍🏽 🇩🇪🇫🇷 ❤️",
    "שלום עולם (hello) 123",
    "مرحبا بالعالم، كيف الحال؟",
    "नमस्ते दुनिया",
    "日本語のテキスト",
    "a    b\t\tc\n\n\n  d",
]


def cut(text, rng):
    """Tokens of 1 to 4 characters that cover the text."""
    spans, i = [], 0
    while i < len(text):
        n = rng.randint(1, 4)
        spans.append((i, min(i + n, len(text))))
        i += n
    return spans


def make_report(texts, seed=0):
    """Every text in every place that a report has for one."""
    rng = random.Random(seed)
    layers = [
        Layer(f"layer{i}", texts[i % len(texts)], "nats" if i else "", i != 2, texts[(i + 1) % len(texts)], i < 2)
        for i in range(3)
    ]
    groups = []
    for text in texts:
        responses = []
        for label in ("chosen", text):
            spans = [*cut(text, rng), (-1, -1)]
            names = [*(text[a:b] for a, b in spans[:-1]), text]
            values = {layer.key: [rng.gauss(0.0, 1.0) for _ in spans] for layer in layers}
            responses.append(Response(label, text, names, spans, values, text))
        groups.append(Group(text, responses, text))
    return Report(
        title=texts[0],
        summary=texts[1],
        layers=layers,
        groups=groups,
        panels=[
            Panel(text, {text: [(0, 1.0), (1, 2.0)], "x": [(0, 0.0), (3, 1.0)]}, (text, 1.5)) for text in texts[:3]
        ],
        samples=[Group(text, [Response(text, text)]) for text in texts],
        tables=[Table(texts[0], texts[:3], [texts[3:6]], texts[1])],
        facts={text: {text: text} for text in texts},
    )


def large_report(responses=200, tokens=2000, layers=6, seed=0):
    """Pairs of long responses."""
    rng = random.Random(seed)
    words = ["the", "model", "learns", "from", "tokens", "that", "matter", "and", "credit", "is", "shared", "widely"]
    kinds = [Layer(f"layer{i}", f"source {i}", "nats", i % 3 != 2, "", i < 2) for i in range(layers)]
    groups = []
    for _ in range(responses // 2):
        sides = []
        for label in ("chosen", "rejected"):
            parts = [" " + rng.choice(words) for _ in range(tokens)]
            ends = [0]
            for part in parts:
                ends.append(ends[-1] + len(part))
            spans = list(pairwise(ends))
            values = {kind.key: [rng.gauss(0.0, 1.0) for _ in parts] for kind in kinds}
            sides.append(Response(label, "".join(parts), parts, spans, values))
        groups.append(Group("Write about credit.", sides))
    return Report("200 responses of 2000 tokens", layers=kinds, groups=groups)
