"""Losses that train models to score tokens: segment rewards, edited tokens, implicit process rewards.

They return the same record as preference losses, so that micro-batches and ranks add up alike.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenpo import masked
from tokenpo.credit.basic import expect_shape
from tokenpo.credit.edits import NOT_COUNTED, UNCHANGED
from tokenpo.credit.segments import OUTSIDE, segment_ends, whole_segment
from tokenpo.errors import InputError
from tokenpo.losses.pairwise import Sides, log_ratio, logistic
from tokenpo.methods import Positive, method
from tokenpo.types import LossOutput, TokenStats


@method(
    "segment_preference", kind="reward_model", golden=("segment_reward",), learns=("rm_values",),
    title="Segmenting Text and Learning Their Rewards for Improved RLHF in Language Model",
    paper="https://arxiv.org/abs/2501.02790",
)  # fmt: skip
def segment_preference_loss(
    chosen_values: Tensor,
    rejected_values: Tensor,
    chosen_segments: Tensor,
    rejected_segments: Tensor,
    margin: Tensor | None = None,
) -> LossOutput:
    """Bradley-Terry on responses scored by the mean of a value head over segment ends.

        score = mean_k value at the end of segment k,   loss = mean_p -log sigmoid(score_c - score_r - margin_p)

    (arXiv 2501.02790). `*_values` (P, T): the head at each response token; `*_segments` (P, T): ids of
    `tokenpo.credit.entropy_segments` on the frozen reference's entropy, or `whole_segment`, which gives the
    ordinary reward model loss. `margin` (P,) or none. Gradient reaches the values at segment ends only, grad_score
    / K each. A pair of which one response has no segment (one token or none) is counted and adds 0, with no
    gradient: it has no score. Rewards logged: the scores.
    """
    if len(chosen_values) != len(rejected_values):
        raise InputError(
            f"{len(chosen_values)} chosen rows but {len(rejected_values)} rejected rows: row p of each is pair p"
        )
    terms = (
        _segment_terms("chosen_values", chosen_values, chosen_segments),
        _segment_terms("rejected_values", rejected_values, rejected_segments),
    )
    scores = terms[0].sum(-1), terms[1].sum(-1)
    z = scores[0] - scores[1] - (0.0 if margin is None else margin.detach())
    scored = (chosen_segments != OUTSIDE).any(-1) & (rejected_segments != OUTSIDE).any(-1)
    per_pair = masked.select(logistic(z), scored)
    metrics = {
        "rewards/chosen": scores[0],
        "rewards/rejected": scores[1],
        "rewards/margins": scores[0] - scores[1],
        "rewards/accuracies": (scores[0] > scores[1]).float(),
        "pairs/without_segments": (~scored).float(),
    }
    return _output("pairs", per_pair, terms, metrics)


@method(
    "bradley_terry", kind="reward_model", golden=("segment_reward", "value_guided_search"), learns=("rm_values",),
    title="Training language models to follow instructions with human feedback",
    paper="https://arxiv.org/abs/2203.02155",
)  # fmt: skip
def bradley_terry_loss(
    chosen_values: Tensor,
    rejected_values: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    margin: Tensor | None = None,
) -> LossOutput:
    """The ordinary reward model loss: each response is scored by the head at its last counted token.

        loss = mean_p -log sigmoid(value at the end of chosen p - value at the end of rejected p - margin_p)

    `*_values` (P, T): the head at each response token; `*_mask` (P, T) bool. Gradient reaches the last tokens only,
    but the head can be read at every prefix afterwards (`tokenpo.credit.red_rewards`). The rest as in
    `segment_preference_loss`, of which this is the case of one segment.
    """
    segments = whole_segment(chosen_mask), whole_segment(rejected_mask)
    return segment_preference_loss(chosen_values, rejected_values, *segments, margin)


@method(
    "token_class", kind="reward_model", golden=("fine_grained_supervision",), learns=("logits",),
    title="Aligning Large Language Models via Fine-grained Supervision", paper="https://arxiv.org/abs/2406.02756",
)  # fmt: skip
def token_class_loss(
    edited_logits: Tensor, original_logits: Tensor, edited_operations: Tensor, original_operations: Tensor
) -> LossOutput:
    """Two-class cross-entropy of every token: an editor's tokens are good, removed ones bad, the rest one half each.

        target = (0, 1) where the edited side changed, (1, 0) where the original changed, (1/2, 1/2) elsewhere,
        loss = mean_p (mean_t CE[edited p, t] + mean_t CE[original p, t])

    `*_logits` (P, T, 2), class 1 good; `*_operations` (P, T) of `tokenpo.credit.edit_operations`. The paper's own
    loss could not be read (arXiv 2406.02756); this is the public code of its follow-up on the same labels. An
    unchanged token costs at least log 2. An empty response adds 0. Rewards logged: mean 2 p - 1 a row.
    """
    sides = (
        _class_terms(edited_logits, edited_operations, edited_operations != NOT_COUNTED, good=True),
        _class_terms(original_logits, original_operations, original_operations != NOT_COUNTED, good=False),
    )
    return _class_output(sides, (edited_logits, original_logits), (edited_operations, original_operations))


@method(
    "changed_token_class", kind="reward_model", learns=("logits",),
    title="Aligning Large Language Models via Fine-grained Supervision", paper="https://arxiv.org/abs/2406.02756",
)  # fmt: skip
def changed_token_class_loss(
    edited_logits: Tensor, original_logits: Tensor, edited_operations: Tensor, original_operations: Tensor
) -> LossOutput:
    """`token_class_loss` on changed tokens alone: means over them, a side without any adds 0."""
    changed = [(ops != NOT_COUNTED) & (ops != UNCHANGED) for ops in (edited_operations, original_operations)]
    sides = (
        _class_terms(edited_logits, edited_operations, changed[0], good=True),
        _class_terms(original_logits, original_operations, changed[1], good=False),
    )
    return _class_output(sides, (edited_logits, original_logits), (edited_operations, original_operations))


@method(
    "implicit_prm", kind="reward_model", title="Process Reinforcement through Implicit Rewards",
    paper="https://arxiv.org/abs/2502.01456", needs=("ref_logps",), golden=("implicit_prm",),
)  # fmt: skip
def implicit_prm_loss(stats: TokenStats, outcomes: Tensor, *, beta: Positive = 0.05) -> LossOutput:
    """Cross-entropy of outcomes under an implicit reward model: only outcomes train it, yet it scores every token.

        z_b = beta * sum_t (logps - ref_logps),   loss = mean_b -(y log sigmoid(z_b) + (1 - y) log sigmoid(-z_b))

    (arXiv 2502.01456). `stats` of the reward model on the policy's responses; `outcomes` (B,) y in [0, 1] from the
    verifier. `tokenpo.credit.prime_rewards` reads the trained model. Detached: the reference. Unit: rows.
    `per_token` holds beta * log-ratios of rows with y > 1/2 and of the others. An empty row has z = 0.
    """
    expect_shape("outcomes", outcomes, stats.mask.shape[:1], "one outcome a row of stats")
    ratio = beta * log_ratio(stats)
    z = ratio.sum(-1)
    y = outcomes.detach().to(z.dtype)
    per_row = y * logistic(z) + (1.0 - y) * logistic(-z)
    right = y > 0.5
    metrics = {"rewards/outcome_logit": z, "rewards/accuracies": ((z > 0) == right).float(), "outcomes": y}
    return _output("rows", per_row, (ratio[right], ratio[~right]), metrics)


def _segment_terms(name: str, values: Tensor, segments: Tensor) -> Tensor:
    """(P, T) values at segment ends over how many the row has; sums to the row's score."""
    expect_shape(name, values, segments.shape, "the head at each token of the segments")
    ends = segment_ends(segments)
    return masked.select(values, ends) / masked.count(ends, -1).unsqueeze(-1)


def _class_terms(logits: Tensor, operations: Tensor, counted: Tensor, good: bool) -> Tensor:
    """(P, T) cross-entropy of each counted token over how many the row has; sums to the row's mean."""
    expect_shape("logits", logits, (*operations.shape, 2), "two classes a token, bad and good")
    margin = masked.select(logits[..., 1], counted) - masked.select(logits[..., 0], counted)
    to_good, to_bad = F.softplus(-margin), F.softplus(margin)
    changed = to_good if good else to_bad
    loss = torch.where(operations == UNCHANGED, 0.5 * (to_good + to_bad), changed)
    return masked.select(loss, counted) / masked.count(counted, -1).unsqueeze(-1)


def _class_output(sides: Sides, logits: Sides, operations: Sides) -> LossOutput:
    if len(sides[0]) != len(sides[1]):
        raise InputError(f"{len(sides[0])} edited rows but {len(sides[1])} originals: row p of each is pair p")
    rewards = [
        masked.mean(torch.tanh(0.5 * masked.widen(x.detach()).diff(dim=-1).squeeze(-1)), ops != NOT_COUNTED, -1)
        for x, ops in zip(logits, operations, strict=True)
    ]
    metrics = {
        "rewards/chosen": rewards[0],
        "rewards/rejected": rewards[1],
        "rewards/margins": rewards[0] - rewards[1],
        "rewards/accuracies": (rewards[0] > rewards[1]).float(),
    }
    return _output("pairs", sides[0].sum(-1) + sides[1].sum(-1), sides, metrics)


def _output(unit: str, losses: Tensor, per_token: Sides, metrics: dict[str, Tensor]) -> LossOutput:
    total = losses.sum()
    return LossOutput(
        loss=total / max(len(losses), 1),
        sums={unit: total},
        per_pair=losses,
        per_token=per_token,
        metrics={name: value.detach().mean() for name, value in metrics.items()},
    )
