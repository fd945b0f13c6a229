"""Values on another tokenizer's tokens: exact by characters, or refused."""

import pytest

from tokenpo.errors import InputError
from tokenpo.reward_models.mapping import map_values


def test_pieces_add_up_and_the_end_of_sequence_goes_to_the_last_token():
    spans = [(0, 2), (2, 4), (4, 5), (-1, -1)]
    assert map_values([1.0, 2.0, 3.0, 4.0], spans, [(0, 4), (4, 5)]) == [3.0, 7.0]
    assert map_values([1.0, 2.0, 3.0, 4.0], spans, [(0, 5), (-1, -1)]) == [6.0, 4.0]


@pytest.mark.parametrize("onto", [[(0, 3), (3, 5)], [(0, 4)], [(0, 1), (1, 2), (2, 5)]])
def test_a_token_that_crosses_a_border_is_refused(onto):
    with pytest.raises(InputError, match=r"^row 7: token \d of the reward model covers characters \d to \d"):
        map_values([1.0, 2.0, 3.0], [(0, 2), (2, 4), (4, 5)], onto, where="row 7")
