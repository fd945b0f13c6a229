"""Which tokens an edit changed: the marks that BMC weights."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from tokenpo.errors import InputError
from tokenpo.methods import method

PAPER = "https://arxiv.org/abs/2408.07471"


def modified_positions(
    original: Sequence[int], corrected: Sequence[int], *, ignore: Collection[int] = (), autojunk: bool = False
) -> tuple[list[bool], list[bool]]:
    """One mark a token of each sequence: True where an edit of `original` into `corrected` touches it.

    A replaced or deleted token of `original`, and a replacing or inserted token of `corrected`, is marked, unless
    its id is in `ignore` (BMC: stop words that are one token). Alignment: `difflib.SequenceMatcher`, longest
    matching blocks first; not the least number of edits. `autojunk=True` is difflib's own default and BMC's
    released code: from 200 tokens on, ids in more than 1% of the corrected sequence cannot anchor a match, which
    marks several times as many tokens.
    """
    ignored = frozenset(ignore)
    marks = [False] * len(original), [False] * len(corrected)
    matcher = difflib.SequenceMatcher(None, list(original), list(corrected), autojunk=autojunk)
    for operation, *places in matcher.get_opcodes():
        if operation == "equal":
            continue
        ranges = range(*places[:2]), range(*places[2:])
        for side, (tokens, touched) in enumerate(zip((original, corrected), ranges, strict=True)):
            for position in touched:
                marks[side][position] = tokens[position] not in ignored
    return marks


@method(
    "modified_tokens", kind="token_marks",
    title="Bridging and Modeling Correlations in Pairwise Data for Direct Preference Optimization",
    paper=PAPER, golden=("bmc",),
)  # fmt: skip
def modified_tokens(
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    *,
    ignore: Collection[int] = (),
    autojunk: bool = False,
) -> tuple[Tensor, Tensor]:
    """(P, T_chosen) and (P, T_rejected) float32: 1.0 at tokens that differ between the responses of a pair, else 0.0.

    `*_tokens` int64 ids and `*_mask` bool of the responses; row p of each is pair p. Only counted tokens are
    compared and marked. The results fit `TokenStats.token_weights` of `bmc_loss`, and, as lists, the data columns
    `chosen_token_weights` and `rejected_token_weights`: they do not depend on the policy, so compute them once.
    `ignore`, `autojunk`: see `modified_positions`. BMC's released code compares prompt, response and padding
    together; prompts are equal, so it differs only in how it breaks ties. An empty row leaves its partner marked.
    """
    if len(chosen_tokens) != len(rejected_tokens):
        raise InputError(
            f"{len(chosen_tokens)} chosen rows but {len(rejected_tokens)} rejected rows: row p of each is pair p"
        )
    marks = [torch.zeros(mask.shape, device=mask.device) for mask in (chosen_mask, rejected_mask)]
    for row in range(len(chosen_tokens)):
        masks = chosen_mask[row], rejected_mask[row]
        chosen, rejected = chosen_tokens[row][masks[0]].tolist(), rejected_tokens[row][masks[1]].tolist()
        of_rejected, of_chosen = modified_positions(rejected, chosen, ignore=ignore, autojunk=autojunk)
        for side, found in enumerate((of_chosen, of_rejected)):
            marks[side][row, masks[side]] = torch.tensor(found, dtype=torch.float32, device=masks[side].device)
    return marks[0], marks[1]
