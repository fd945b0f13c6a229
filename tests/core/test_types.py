"""TokenStats checks its shapes once and says which field is wrong."""

import pytest
import torch

from tokenpo.errors import InputError, MissingInputError
from tokenpo.types import TokenStats

MASK = torch.ones(2, 3, dtype=torch.bool)
LOGPS = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"mask": MASK.float()}, "TokenStats.mask must be bool"),
        ({"mask": MASK[0]}, r"TokenStats.mask must be \(B, T\), got shape \(3,\)"),
        ({"logps": LOGPS[:, :2]}, r"TokenStats.logps has shape \(2, 2\) but mask has \(2, 3\)"),
        ({"ref_kl": LOGPS[0]}, "TokenStats.ref_kl has shape"),
        ({"token_rewards": MASK}, "TokenStats.token_rewards must be a floating-point tensor"),
    ],
)
def test_wrong_fields_are_named(fields, sentence):
    with pytest.raises(InputError, match=sentence):
        TokenStats(**{"mask": MASK, "logps": LOGPS, **fields})


def test_rows():
    stats = TokenStats(mask=MASK, logps=torch.arange(6.0).reshape(2, 3))
    assert stats[1:].logps.tolist() == [[3.0, 4.0, 5.0]]
    assert stats[torch.tensor([1, 0])].logps[0].tolist() == [3.0, 4.0, 5.0]
    assert stats[:1].ref_logps is None


def test_a_missing_field_names_the_remedy():
    with pytest.raises(MissingInputError) as error:
        TokenStats(mask=MASK, logps=LOGPS).require("ref_kl")
    assert str(error.value).startswith("'ref_kl' is missing: ask the statistics for 'ref_kl'")
