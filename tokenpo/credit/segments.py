"""Segment rewards: a response cut where the reference was unsure, one value a segment, spread over its tokens.

Segment ids: (B, T) int64, 0, 1, ... along a row, `OUTSIDE` at masked tokens and at the last token (end of
sequence), which belongs to no segment.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenpo import masked
from tokenpo.credit.basic import expect_shape, final_token, previous_token
from tokenpo.methods import Finite, NonNegative, Positive, method

TITLE = "Segmenting Text and Learning Their Rewards for Improved RLHF in Language Model"
PAPER = "https://arxiv.org/abs/2501.02790"

OUTSIDE = -1

LOG_EPS = 1e-10
"""Added to a relative position before its logarithm, by the paper's released code."""


@method(
    "segment_reward", kind="credit", title=TITLE, paper=PAPER, needs=("entropy",), golden=("segment_reward",),
    sums_to_reward=False, causal=False,
)  # fmt: skip
def segment_rewards(
    rm_values: Tensor,
    entropy: Tensor,
    mask: Tensor,
    *,
    threshold: NonNegative = 2.0,
    w_mean: Finite = 0.0,
    w_std: Finite = 0.0,
    b_mean: Finite = 0.0,
    b_std: Finite = 1.0,
    least_std: Positive | None = None,
) -> Tensor:
    """(B, T) token rewards: each segment's normalised value, spread evenly over the segment's tokens.

        r_t = v_k / length_k for t in segment k,   v_k = (value at the segment's end - mu(p_k)) / sigma(p_k),
        mu(p) = w_mean * log(p) + b_mean,  sigma(p) = w_std * log(p) + b_std,  p_k = (k+1)/K    (arXiv 2501.02790)

    `rm_values` (B, T): the segment reward model's head at each response token; `entropy` (B, T), nats, of the frozen
    *reference* where token t was drawn; segments as in `entropy_segments`. The four numbers belong to one reward
    model and threshold: `tokenpo.reward_models.fit_location_normaliser` finds them; left out, nothing is
    normalised. sigma turns negative, and the reward's sign with it, early in long responses with some released
    numbers; `least_std` bounds it from below, the released code does not. The last token gets 0; rows of one token
    get nothing. Segment k sums to v_k; no sequence reward is preserved; within a segment not causal. The paper
    clamps these rewards to [-10, 10] before it subtracts the KL penalty. Detached.
    """
    segments = entropy_segments(entropy, mask, threshold=threshold)
    values = normalised_segment_values(
        rm_values, segments, w_mean=w_mean, w_std=w_std, b_mean=b_mean, b_std=b_std, least_std=least_std
    )
    return spread_in_segments(values, segments)


def entropy_segments(entropy: Tensor, mask: Tensor, *, threshold: NonNegative = 2.0) -> Tensor:
    """(B, T) int64 segment ids: a token starts a new segment where its entropy exceeds `threshold`, strictly.

    The first token always starts one, the last token belongs to none, whether it ends the sequence or was cut off.
    0 makes every token its own segment. The released code calls threshold 1000 the whole response *with* its end:
    that is `whole_segment`. The paper's thresholds: 1.75 (Phi-3-mini), 2.0 (Llama-3 8B).
    """
    expect_shape("entropy", entropy, mask.shape, "nats, one a token of mask")
    inside = mask & ~final_token(mask)
    starts = inside & (previous_token(mask) >= 0) & (masked.select(entropy.detach(), mask) > threshold)
    return torch.where(inside, starts.cumsum(-1), OUTSIDE)


def whole_segment(mask: Tensor) -> Tensor:
    """(B, T) int64 segment ids of one segment a row that ends at its last token: the bandit."""
    return torch.where(mask, 0, OUTSIDE)


def segment_ends(segments: Tensor) -> Tensor:
    """(B, T) bool: the last token of each segment."""
    following = _following(segments)
    return (segments != OUTSIDE) & (following != segments)


def segment_lengths(segments: Tensor) -> Tensor:
    """(B, T) int64: how many tokens the segment of each token has; 0 outside."""
    inside = segments != OUTSIDE
    places = torch.where(inside, segments, segments.shape[-1])
    counts = segments.new_zeros(len(segments), segments.shape[-1] + 1).scatter_add(-1, places, inside.long())
    return torch.where(inside, counts.gather(-1, places), 0)


def normalised_segment_values(
    rm_values: Tensor,
    segments: Tensor,
    *,
    w_mean: Finite = 0.0,
    w_std: Finite = 0.0,
    b_mean: Finite = 0.0,
    b_std: Finite = 1.0,
    least_std: Positive | None = None,
) -> Tensor:
    """(B, T) v_k of `segment_rewards` at the end of segment k, zero elsewhere. Detached."""
    expect_shape("rm_values", rm_values, segments.shape, "the reward model's head at each token of segments")
    ends = segment_ends(segments)
    values = masked.select(rm_values.detach(), ends)
    total = ends.sum(-1, keepdim=True).clamp(min=1)
    location = torch.log((segments.clamp(min=0) + 1).to(values.dtype) / total + LOG_EPS)
    std = w_std * location + b_std
    std = std if least_std is None else std.clamp(min=least_std)
    return masked.select((values - (w_mean * location + b_mean)) / std, ends)


def spread_in_segments(end_values: Tensor, segments: Tensor) -> Tensor:
    """(B, T) the value at each segment's end, divided evenly over the segment's tokens; a segment's sum is kept."""
    return masked.select(repeat_in_segments(end_values, segments) / segment_lengths(segments), segments != OUTSIDE)


def repeat_in_segments(end_values: Tensor, segments: Tensor) -> Tensor:
    """(B, T) the value at each segment's end on all of the segment's tokens: an ablation of the paper."""
    inside = segments != OUTSIDE
    places = torch.where(inside, segments, segments.shape[-1])
    at_ends = masked.select(end_values.detach(), segment_ends(segments))
    per_segment = at_ends.new_zeros(len(segments), segments.shape[-1] + 1).scatter_add(-1, places, at_ends)
    return masked.select(per_segment.gather(-1, places), inside)


def _following(segments: Tensor) -> Tensor:
    """(B, T) the segment id of the next token that is in a segment, `OUTSIDE` where there is none."""
    ids = torch.where(segments == OUTSIDE, segments.shape[-1] + 1, segments)
    later = ids.flip(-1).cummin(-1).values.flip(-1) if segments.shape[-1] else ids
    shifted = torch.cat([later[:, 1:], torch.full_like(later[:, :1], segments.shape[-1] + 1)], -1)
    return torch.where(shifted > segments.shape[-1], OUTSIDE, shifted)
