"""The soft Q-function inside a DPO policy: values, the rewards they imply, and scores for search.

In the token decision process (deterministic, undiscounted, value 0 after the last token) a policy softmax(l) is
optimal for Q = beta * l and V = beta * logsumexp(l). Raw logits are free up to a shift a state, so V, Q and the
rewards below change with it; the implicit reward beta * log(pi / pi_ref) (`tokenpo.credit.implicit_rewards`) and
every score of a whole response do not. Everything returned is detached.
"""

from __future__ import annotations

from torch import Tensor

from tokenpo import masked
from tokenpo.credit.basic import expect_shape, next_token, take_columns
from tokenpo.errors import InputError
from tokenpo.methods import Positive, method

TITLE = "From r to Q*: Your Language Model is Secretly a Q-Function"
PAPER = "https://arxiv.org/abs/2404.12358"


def soft_values(logits: Tensor, *, beta: Positive = 0.1) -> Tensor:
    """(...,) V = beta * logsumexp(logits) of the state before each token; `logits` (..., V), raw, of the policy."""
    return beta * masked.widen(logits.detach()).logsumexp(-1)


def soft_q_values(logits: Tensor, tokens: Tensor, *, beta: Positive = 0.1) -> Tensor:
    """(...,) Q = beta * logit of the taken token; `logits` (..., V), `tokens` (...,) int64. Q - V = beta * logps."""
    return beta * masked.widen(logits.detach()).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


@method("bellman", kind="credit", title=TITLE, paper=PAPER, needs=("ref_logps",), golden=("q_star",),
        causal=True, sums_to_reward=False)  # fmt: skip
def bellman_rewards(logps: Tensor, ref_logps: Tensor, values: Tensor, mask: Tensor, *, beta: Positive = 0.1) -> Tensor:
    """(B, T) token rewards that make the policy optimal, from the soft Bellman equation; zero off the mask, detached.

        r_t = beta * (logps_t - ref_logps_t) + V_t - V_{t+1},    V = 0 after the last counted token

    (inverting Q*(s, a) = r(s, a) + beta * log pi_ref(a | s) + V*(s'), eq. 7 of arXiv 2404.12358). `logps`,
    `ref_logps` nats and `values` (`soft_values`) (B, T): `values[t]` of the state before token t; `mask` bool. A row
    sums to its implicit reward plus V of its first state. Each reward depends on the prefix and its token only.
    Where the mask has gaps, the next state is that of the next counted token.
    """
    expect_shape("values", values, tuple(mask.shape), "the value before each token of mask")
    values = masked.select(values, mask)
    after = take_columns(values, next_token(mask), 0.0)
    implicit = beta * (masked.select(logps, mask) - masked.select(ref_logps, mask))
    return masked.select(implicit + values - after, mask).detach()


@method("expected_implicit", kind="credit", title=TITLE, paper=PAPER, needs=("ref_kl",), golden=("q_star",),
        causal=True, sums_to_reward=False)  # fmt: skip
def expected_implicit_rewards(ref_kl: Tensor, mask: Tensor, *, beta: Positive = 0.1) -> Tensor:
    """(B, T) implicit reward that the reference's own tokens would earn on average: -beta * ref_kl; detached.

    `ref_kl` KL(reference || policy) at each position, nats; `mask` bool. Never positive: training that starts at the
    reference must lower the implicit reward of its samples, on average.
    """
    return masked.select(-beta * masked.select(ref_kl, mask), mask).detach()


def search_scores(logps: Tensor, mask: Tensor, *, beta: Positive = 0.1) -> Tensor:
    """(B, T) score of each prefix, beta * sum of logps so far; zero off the mask, detached.

    Up to the value of the first state, the same for all candidates, it is the return of the prefix plus the soft
    value of where it ends: sum_{i<=t} (r_i + beta * ref_logps_i) + V_{t+1} = V_0 + beta * sum_{i<=t} logps_i. So
    beam search by likelihood on a DPO policy is search guided by its value function (section 4.3 of
    arXiv 2404.12358; it prints -V_0, the algebra gives +V_0, and no choice depends on it).
    """
    return masked.select((beta * masked.select(logps, mask)).cumsum(-1), mask).detach()


def extension_scores(prefix_scores: Tensor, logits: Tensor, *, beta: Positive = 0.1) -> Tensor:
    """(K, V) score of every one-token extension of K prefixes, detached: a beam search keeps the best of these.

    `prefix_scores` (K,), from `search_scores` or the step before, zero at the start; `logits` (K, V) of the policy
    after each prefix. The paper's beams: 5; more lower the quality and lengthen the text.
    """
    if prefix_scores.shape != logits.shape[:-1]:
        raise InputError(
            f"prefix_scores has shape {tuple(prefix_scores.shape)} but logits {tuple(logits.shape)}: one score a prefix"
        )
    extended = masked.widen(prefix_scores).unsqueeze(-1) + beta * masked.widen(logits).log_softmax(-1)
    return extended.detach()
