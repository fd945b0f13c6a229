"""The same values in the terminal, where no text may steer anything."""

import io
import os
import re
import sys

import pytest
from hostile import HOSTILE, make_report

from tokenpo.report import Group, Layer, Report, Response, Table, show
from tokenpo.report.terminal import colour, safe

REPORT = Report(
    "t",
    layers=[Layer("good", "worth", shown=True), Layer("kl", "KL", "nats", signed=False)],
    groups=[
        Group(
            "A  review:\n",
            [
                Response("chosen", "a fine\nday", ["a", " fine", "\n", "day"], [(0, 1), (1, 6), (6, 7), (7, 10)],
                         {"good": [0.0, 2.0, 0.0, -1.0], "kl": [0.1, 0.0, 0.0, 0.3]}),
                Response("rejected", "no", ["no", "<eos>"], [(0, 2), (-1, -1)], {"good": [-2.0, 1.0]}),
            ],
        )
    ],
    tables=[Table("T", ["", "x"], [["row", "1"]])],
)  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_without_colours_the_strongest_tokens_are_named():
    out = io.StringIO()
    show(REPORT, file=out)
    assert out.getvalue() == (
        "\nT\n        x\n  row   1\n\n> A review:\n\n  chosen\n    a fine\n    day\n"
        "    worth: sum +1.00; fine +2.00, day -1.00\n"
        "\n  rejected\n    no<eos>\n    worth: sum -1.00; no -2.00, <eos> +1.00\n"
    )


def test_layers_can_be_chosen():
    out = io.StringIO()
    show(REPORT, layers=["kl"], file=out)
    assert "KL: sum 0.40; day 0.30, a 0.10" in out.getvalue() and "worth" not in out.getvalue()


@pytest.mark.parametrize("rich", [True, False])
def test_colours_are_those_of_the_values(rich, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "truecolor")
    if rich:
        # datasets puts a copy in the place of os.environ when it maps; rich would read the one it found at its import.
        monkeypatch.setattr("rich.console.Console._environ", os.environ)
    else:
        for name in ("rich", "rich.console"):
            monkeypatch.setitem(sys.modules, name, None)
    out = Terminal()
    show(REPORT, file=out)
    text = out.getvalue()
    red, green, blue = colour(2.0, REPORT.layers[0], 2.0)
    assert f"48;2;{red};{green};{blue}m fine" in text
    assert "day" in re.sub(r"\x1b\[[\d;]*m", "", text)


def test_no_color_is_respected(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    out = Terminal()
    show(REPORT, file=out)
    assert "\x1b" not in out.getvalue()


@pytest.mark.parametrize("terminal", [io.StringIO, Terminal])
def test_texts_cannot_steer_the_terminal(terminal, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = terminal()
    show(make_report(HOSTILE), groups=len(HOSTILE), file=out)
    kept = re.sub(r"\x1b\[[\d;]*m", "", out.getvalue())
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", kept)
    kept.encode()


def test_safe_keeps_ordinary_text():
    assert safe("ünï שלום 日本\n\tx") == "ünï שלום 日本\n\tx"
    assert safe("\x1b[31m\r\x9b\u202e") == "␛[31m␍··"
