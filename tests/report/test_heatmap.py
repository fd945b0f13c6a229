"""The page: any text is text, the only script is its own, and the numbers in it are the right ones."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest
from hostile import HOSTILE, SCRIPTS, large_report, make_report

from tokenpo.report import Group, Layer, Report, Response, render, write_html
from tokenpo.report.page import embedded

TAGS = set(
    "html head meta title style body a header p h1 nav main section h2 h3 h4 div table thead tbody tr th td figure "
    "figcaption span label input output script button article details summary dl dt dd".split()
)


class Reader(HTMLParser):
    """Elements with attributes, and the text of each kind of element."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.texts = [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "input"):
            self.open.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else None, data))

    def inside(self, kind):
        """Texts directly in elements of this class."""
        return [data for where, data in self.texts if where and kind in where[1].get("class", "").split()]


@pytest.fixture(scope="module")
def page():
    return render(make_report([*HOSTILE, *SCRIPTS]))


def test_no_element_or_attribute_comes_from_a_text(page):
    found = Reader(page)
    assert {tag for tag, _ in found.elements} == TAGS - {"details", "summary"}
    assert found.open == []
    for tag, attributes in found.elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("style", "srcdoc", "src")]
        if tag == "a":
            assert attributes["href"].startswith("#")


def test_texts_are_shown_as_they_are(page):
    found = Reader(page)
    texts = [t.translate({13: 0x240D}) for t in found.inside("text")]
    for text in [*HOSTILE[:20], *SCRIPTS]:
        assert texts.count(text) == 3, text  # two responses and a sample


def test_only_the_pages_own_script_and_style_may_run(page):
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', page)
    for tag, part in (("script", "script-src"), ("style", "style-src")):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.S)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{part} &#x27;sha256-{digest}&#x27;" in policy or f"{part} 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert not re.search(r"https?://", page.replace("http://www.w3.org/2000/svg", ""))


def test_json_inside_scripts_cannot_end_them():
    text = embedded({"x": "</script><!-- & \u2028 \u2029 ünï"})
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == {"x": "</script><!-- & \u2028 \u2029 ünï"}


def test_the_same_report_gives_the_same_bytes(page, tmp_path):
    path = write_html(make_report([*HOSTILE, *SCRIPTS]), tmp_path / "deep" / "r.html")
    assert path.read_text(encoding="utf-8") == page
    assert list(path.parent.iterdir()) == [path]


def test_the_numbers_of_a_response():
    layers = [Layer("a", "A"), Layer("b", "B", signed=False)]
    values = {"a": [0.5, -0.25, 1.0, float("nan"), 2.0], "b": [1, 2, 3, 4, 123456.0]}
    one = Response("chosen", "𝒳 日x", ["𝒳", "?", "?", "x", "</s>"], [(0, 1), (2, 3), (2, 3), (3, 4), (-1, -1)], values)
    found = Reader(render(Report("t", layers=layers, groups=[Group("p", [one])])))
    (data,) = (
        json.loads(t) for where, t in found.texts if where == ("script", {"type": "application/json", "class": "data"})
    )
    assert data == [
        {
            "n": [2, 1, 1, 1, 0],  # UTF-16 units: the first character is two
            "c": [1, 0, 2, 1, 1],  # the space belongs to no token, the third character to two
            "s": {"4": "</s>"},
            "v": {"0": [0.5, 0.75, None, 2], "1": [1, 5, 4, 123500]},
        }
    ]
    (scales,) = (json.loads(t) for where, t in found.texts if where and where[1].get("id") == "layers")
    assert [s["signed"] for s in scales] == [True, False] and scales[0]["limit"] == 2.0


def test_long_prompts_are_folded():
    page = render(Report("t", groups=[Group("word " * 100, [Response("chosen", "x")])]))
    assert "<details><summary>word word" in page and "application/json" not in page


def test_many_long_responses_stay_small():
    page = render(large_report(responses=4, tokens=500, layers=3))
    assert len(page) < 4 * 500 * (3 * 8 + 8 + 8) + 45_000
