"""Credit by word against a lexicon: figures by hand, and the file that says which words matter."""

import pytest
import torch

from tokenpo.errors import InputError
from tokenpo.evaluation.word_credit import read_lexicon, valence_figures

WORTHS = torch.tensor([[1.0, -2.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
CREDIT = torch.tensor([[3.0, -1.0, 2.0, -4.0], [0.0, 0.0, torch.nan, torch.nan]])
MASK = torch.tensor([[True] * 4, [True, True, False, False]])


def test_figures_by_hand():
    found = valence_figures(CREDIT, WORTHS, MASK, draws=50)
    assert found["good"] == (1 + 1 / 2) / 2
    assert found["bad"] == pytest.approx(2 / 3)  # 1 beats -3 and -2, not 4; the second response has no bad word
    assert found["any"] == (1 / 4 + 1 / 2) / 2  # sizes 3, 1 against 2, 4
    assert found["precision_at_k"] == (1 / 2 + 1 / 2) / 2
    assert found["pooled_good"] == 6.5 / 8  # 3 beats -1, 2, -4, 0; 0 beats -1, -4 and ties with 0
    assert found["pooled_bad"] == 4 / 5 and found["pooled_any"] == pytest.approx((2 + 1 + 1 / 2) / 9)
    assert found["chance"] == 3 / 6 and found["responses"] == 2
    assert found["good_interval"] == [0.5, 1.0] and found["bad_interval"] == pytest.approx([2 / 3, 2 / 3])


def test_a_method_that_says_sizes_is_taken_at_its_word():
    sizes = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    found = valence_figures(CREDIT, WORTHS, MASK, sizes=sizes, draws=10)
    assert found["any"] == found["precision_at_k"] == found["pooled_any"] == 1.0 and found["good"] == 0.75


def test_the_lexicon_itself_scores_one_and_equal_credit_a_half():
    truth = valence_figures(WORTHS, WORTHS, MASK, draws=10)
    equal = valence_figures(torch.ones_like(WORTHS), WORTHS, MASK, draws=10)
    for name in ("good", "bad", "any"):
        assert (truth[name], equal[name], truth[f"pooled_{name}"], equal[f"pooled_{name}"]) == (1.0, 0.5, 1.0, 0.5)
    assert truth["precision_at_k"] == 1.0 and equal["precision_at_k"] == 0.5


def test_what_is_not_defined_is_left_out_and_nan_is_refused():
    assert {"bad", "pooled_bad"}.isdisjoint(valence_figures(CREDIT[1:, :2], WORTHS[1:, :2], MASK[1:, :2], draws=10))
    with pytest.raises(InputError, match="credit is NaN at a word that counts"):
        valence_figures(CREDIT, WORTHS, torch.ones_like(MASK))


def test_a_lexicon_in_vaders_form(tmp_path):
    file = tmp_path / "lexicon.txt"
    file.write_text("Good\t1.9\t0.9434\t[2, 1]\n\n:(\t-1.9\t0.7\t[-2]\nso\t0\n", encoding="utf-8")
    assert read_lexicon(file) == {"good": 1.9, ":(": -1.9, "so": 0.0}


@pytest.mark.parametrize("line", ["good", "good 1.9", "good\tmuch", "good\tnan"])
def test_lines_that_are_no_entry_are_named(line, tmp_path):
    file = tmp_path / "lexicon.txt"
    file.write_text(f"bad\t-1\n{line}\n")
    with pytest.raises(InputError, match=r"lexicon.txt, line 2: wants a word, a TAB and its valence, got 'good"):
        read_lexicon(file)


def test_a_lexicon_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot read the lexicon .*nothing.txt: No such file or directory"):
        read_lexicon(tmp_path / "nothing.txt")
