"""Tokens become the text they are: which characters a reader sees as one, and which values belong to them."""

from itertools import pairwise

import pytest

from tokenpo.errors import InputError
from tokenpo.report import Group, Layer, Report, Response, pieces
from tokenpo.report.views import Piece, limit, piece_values, printable


def response(text, spans, values=None):
    values = list(range(1, len(spans) + 1)) if values is None else values
    return Response("chosen", text, ["?"] * len(spans), spans, {"v": [float(v) for v in values]})


def shown(text, spans):
    """Text and summed value of each piece."""
    r = response(text, spans)
    parts = pieces(r)
    return [(text[p.start : p.end], v) for p, v in zip(parts, piece_values(parts, r.values["v"]), strict=True)]


def test_tokens_of_one_character_are_one_piece():
    # A byte-level vocabulary: three tokens for the first character, one for the second.
    assert shown("日本", [(0, 1), (0, 1), (0, 1), (1, 2)]) == [("日", 6.0), ("本", 4.0)]


def test_a_combining_mark_stays_with_its_letter():
    assert shown("e\u0301a", [(0, 1), (1, 2), (2, 3)]) == [("e\u0301", 3.0), ("a", 3.0)]
    assert shown("नमस्ते", [(i, i + 1) for i in range(6)]) == [("न", 1.0), ("म", 2.0), ("स्", 7.0), ("ते", 11.0)]


def test_joined_emoji_skin_tones_and_flags_stay_whole():
    family = "👩\u200d👧"
    assert shown(family + "x", [(0, 1), (1, 2), (2, 3), (3, 4)]) == [(family, 6.0), ("x", 4.0)]
    assert shown("👍🏽", [(0, 1), (1, 2)]) == [("👍🏽", 3.0)]
    assert shown("🇩🇪🇫🇷", [(i, i + 1) for i in range(4)]) == [("🇩🇪", 3.0), ("🇫🇷", 7.0)]


def test_characters_of_no_token_and_tokens_without_characters():
    r = response("a  b", [(0, 1), (3, 4), (-1, -1)])
    assert pieces(r) == [Piece(0, 1, 0, 1), Piece(3, 4, 1, 2), Piece(0, 0, 2, 3)]


def test_right_to_left_text_keeps_its_logical_order():
    assert [t for t, _ in shown("שלום עולם", [(0, 4), (4, 9)])] == ["שלום", " עולם"]


def test_every_token_is_in_exactly_one_piece():
    for spans in ([(0, 2), (1, 3), (5, 4), (9, 12), (2, 3)], [(-1, -1)] * 3, [(0, 3), (0, 1)]):
        parts = pieces(response("abc", spans))
        assert [t for p in parts for t in range(p.first, p.last)] == list(range(len(spans)))
        ends = [(p.start, p.end) for p in parts if p.end]
        assert all(a[1] <= b[0] for a, b in pairwise(ends))


def test_the_scale_ends_where_nearly_all_values_are():
    values = [0.0] * 50 + [1.0] * 98 + [-40.0, float("nan")]
    r = response("", [(-1, -1)] * 150, values)
    assert limit(Report("t", layers=[Layer("v", "v")], groups=[Group("p", [r])]), "v") == 1.0
    assert limit(Report("t", layers=[Layer("v", "v")]), "v") == 1.0


def test_printable_keeps_the_length():
    assert printable("a\x00\r\n\t\x1b\ud800\x7f") == "a␀␍\n\t␛\ufffd␡"


def test_values_that_do_not_fit_are_named():
    with pytest.raises(InputError, match="2 tokens, but 3 entries of 'v'"):
        response("ab", [(0, 1), (1, 2)], [1, 2, 3])
