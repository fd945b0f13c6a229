"""Attention-based credit: a reward spread over tokens as a transformer already attended to them.

Needs attention weights, which flash and sdpa kernels do not return: load the model with
`attn_implementation="eager"`. `positions` (B, T) int64 says where response token t sits on the attention's key
axis, so that left padding, prompts of any length and skipped tokens all read the right cells.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenpo import masked
from tokenpo.credit.basic import expect_shape, final_token, last_token_rewards, token_index
from tokenpo.errors import InputError
from tokenpo.methods import Fraction, method

TITLE = "Dense Reward for Free in Reinforcement Learning from Human Feedback"
PAPER = "https://arxiv.org/abs/2402.00782"


@method("abc", kind="credit", title=TITLE, paper=PAPER, golden=("abc",), sums_to_reward=True, causal=False)
def abc_rewards(
    rewards: Tensor, attentions: Tensor, positions: Tensor, mask: Tensor, *, beta: Fraction = 0.8
) -> Tensor:
    """ABC: the sequence reward spread by the reward model's own attention from its last position.

        r_t = beta * alpha_t * R + (1 - beta) * R * [t is the last token]                    (arXiv 2402.00782)

    alpha as in `abc_weights`. `rewards` (B,); `attentions` (B, H, S, S) of the reward model's last layer;
    `positions`, `mask` (B, T). Sums to R for every beta; not causal (alpha reads the whole response), so take the
    total return. beta: 0.8 in the authors' runs, 0.5 their other default; 0 is `last_token_rewards`. Detached.
    """
    return spread_by_weights(rewards, abc_weights(attentions, positions, mask), mask, beta=beta)


@method("abc_d", kind="credit", title=TITLE, paper=PAPER, golden=("abc",), sums_to_reward=True, causal=False)
def abc_d_rewards(
    rewards: Tensor, step_attentions: Tensor, positions: Tensor, mask: Tensor, *, beta: Fraction = 0.8, shift: int = 0
) -> Tensor:
    """ABC-D: as `abc_rewards`, spread by the attention of the policy itself while it wrote, averaged over steps.

    `step_attentions` (B, H, T, S): last layer, row t from the step that emitted token t. Weights and `shift` as in
    `abc_d_weights`; `shift=1` is the released code, which credits attention on token j to token j + 1.
    """
    return spread_by_weights(rewards, abc_d_weights(step_attentions, positions, mask, shift=shift), mask, beta=beta)


@method("abc_d_last", kind="credit", title=TITLE, paper=PAPER, golden=("abc",), sums_to_reward=True, causal=False)
def abc_d_last_rewards(
    rewards: Tensor, step_attentions: Tensor, positions: Tensor, mask: Tensor, *, beta: Fraction = 0.8, shift: int = 0
) -> Tensor:
    """ABC-D from the step that emitted the last token alone; otherwise `abc_d_rewards`."""
    weights = abc_d_last_weights(step_attentions, positions, mask, shift=shift)
    return spread_by_weights(rewards, weights, mask, beta=beta)


def spread_by_weights(rewards: Tensor, weights: Tensor, mask: Tensor, *, beta: Fraction = 1.0) -> Tensor:
    """(B, T) `beta * weights * R + (1 - beta) * R on the last token`; sums to R where the weights sum to 1."""
    last = last_token_rewards(rewards, mask)
    spread = masked.select(weights.detach(), mask) * masked.widen(rewards.detach()).unsqueeze(-1)
    return masked.select(beta * spread + (1.0 - beta) * last, mask)


def abc_weights(attentions: Tensor, positions: Tensor, mask: Tensor, query: Tensor | None = None) -> Tensor:
    """(B, T) weights that sum to 1: mean over heads of one attention row, renormalised over the response's tokens.

    `attentions` (B, H, S, S). The row read is that of the last response token, or `query` (B,) int64 on the same
    axis, for a reward model that pools at a special token behind the response. A row that pays the response no
    attention is uniform; a response of one token gets 1; an empty one zeros. Detached.
    """
    _expect_attention("attentions", attentions, positions, mask)
    if query is None:
        query = torch.where(final_token(mask), positions, 0).sum(-1)
    rows = masked.widen(attentions.detach())[torch.arange(len(mask), device=mask.device), :, query]
    return _normalised(_keys(rows.mean(1), positions, mask), mask)


def abc_d_weights(step_attentions: Tensor, positions: Tensor, mask: Tensor, *, shift: int = 0) -> Tensor:
    """(B, T) weights that sum to 1: for each token, the mean of the attention that later steps paid to it.

    `step_attentions` (B, H, T, S). Mean over heads, then over the steps after the token that attend to it at all
    (weight > 0), then renormalised. The step of token 0 sees the prompt only and counts for nothing. Attention on
    token j goes to token j + `shift`: with 0 the last token, which nothing attends to, has weight 0; the released
    code has 1, so its token 0 has none. A row without any attention is uniform, where the released code divides
    by zero (one-token responses). Detached.
    """
    _expect_attention("step_attentions", step_attentions, positions, mask)
    steps = _attention_between_tokens(step_attentions, positions, mask)
    attended = (steps > 0).sum(1)
    return _normalised(_shifted(steps.sum(1) / attended.clamp(min=1), mask, shift), mask)


def abc_d_last_weights(step_attentions: Tensor, positions: Tensor, mask: Tensor, *, shift: int = 0) -> Tensor:
    """(B, T) weights that sum to 1: the attention of the step that emitted the last token; else `abc_d_weights`."""
    _expect_attention("step_attentions", step_attentions, positions, mask)
    steps = _attention_between_tokens(step_attentions, positions, mask)
    final = torch.where(final_token(mask).unsqueeze(-1), steps, 0.0).sum(1)
    return _normalised(_shifted(final, mask, shift), mask)


def _expect_attention(name: str, attention: Tensor, positions: Tensor, mask: Tensor) -> None:
    expect_shape("positions", positions, mask.shape, "where each token sits on the attention's key axis")
    if attention.dim() != 4:
        raise InputError(f"{name} must be (B, heads, queries, keys), one layer, got shape {tuple(attention.shape)}")
    outside = mask & ((positions < 0) | (positions >= attention.shape[-1]))
    if outside.any():
        row, column = outside.nonzero()[0].tolist()
        raise InputError(
            f"positions[{row}, {column}] is {positions[row, column].item()} but {name} has "
            f"{attention.shape[-1]} keys: positions count along the row that the model read"
        )


def _keys(rows: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """Cells of the response's tokens: (..., B, S) over keys to (..., B, T) over tokens, zero off the mask."""
    columns = torch.where(mask, positions, 0)
    return masked.select(rows.gather(-1, columns), mask)


def _attention_between_tokens(step_attentions: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """(B, T, T) head-mean attention that step i paid to token j, zero unless j was emitted before i."""
    heads = masked.widen(step_attentions.detach()).mean(1)
    columns = torch.where(mask, positions, 0).unsqueeze(1).expand(-1, heads.shape[1], -1)
    index = token_index(mask)
    earlier = index.unsqueeze(1) < index.unsqueeze(2)
    return masked.select(heads.gather(-1, columns), mask.unsqueeze(1) & mask.unsqueeze(2) & earlier)


def _shifted(weights: Tensor, mask: Tensor, shift: int) -> Tensor:
    """Each counted token takes the weight of the counted token `shift` places before it; zero where there is none."""
    order = torch.where(mask, token_index(mask), mask.shape[-1]).argsort(dim=-1, stable=True)
    dense = weights.gather(-1, order)
    source = token_index(mask) - shift
    inside = mask & (source >= 0) & (source < mask.sum(-1, keepdim=True))
    return masked.select(dense.gather(-1, torch.where(inside, source, 0)), inside)


def _normalised(weights: Tensor, mask: Tensor) -> Tensor:
    """`weights` over their sum along the mask; uniform where the sum is zero."""
    total = weights.sum(-1, keepdim=True)
    uniform = 1.0 / masked.count(mask, -1).unsqueeze(-1).to(weights.dtype)
    return masked.select(torch.where(total > 0, weights / torch.where(total > 0, total, 1.0), uniform), mask)
