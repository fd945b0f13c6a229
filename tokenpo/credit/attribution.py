"""Token rewards from explanations of a reward model: Shapley values and LIME over sets of kept tokens.

A coalition is a bool row over the n tokens of one response: which are kept; the prompt always is. How a removed
token is hidden from the reward model (deleted, or padding without attention) is the caller's choice. Explanations
read the whole response: they are not potentials of its prefix, so what they give is not causal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenpo import masked
from tokenpo.credit.basic import expect_shape, final_token
from tokenpo.errors import InputError
from tokenpo.methods import Fraction, NonNegative, Positive, method

TITLE = "Learning Explainable Dense Reward Shapes via Bayesian Optimization"
PAPER = "https://arxiv.org/abs/2504.16272"

EXACT_LIMIT = 16
"""Exact Shapley values ask the reward model 2^n times."""

Score = Callable[[Tensor], Tensor]
"""(N, n) bool coalitions to (N,) rewards of the reward model."""


@method(
    "explainable_dense", kind="credit", title=TITLE, paper=PAPER, golden=("explainable_dense",),
    sums_to_reward=True, causal=False,
)  # fmt: skip
def explainable_rewards(
    rewards: Tensor,
    shapley: Tensor,
    lime: Tensor,
    mask: Tensor,
    *,
    shapley_weight: Fraction = 0.5,
    lime_weight: Fraction = 0.0,
) -> Tensor:
    """The sequence reward spread by a blend of explanations of the reward model and the last token.

        r_t = R * (w_shapley * softmax(shapley)_t + w_lime * softmax(lime)_t + w_last * [t is the last token]),
        w_last = 1 - w_shapley - w_lime                                                      (arXiv 2504.16272)

    `rewards` (B,); `shapley`, `lime` (B, T) attributions (`exact_shapley`, `sampled_shapley`, `lime_attribution`).
    Sums to R. Not causal: take the total return. The softmax is this library's choice, the paper's normaliser could
    not be read; `absolute_shape` is another, and `blend_shapes` takes any number of components. The paper learns
    the weights around whole training runs: `search_shape_weights`. A row without tokens gets nothing. Detached.
    """
    last_weight = 1.0 - shapley_weight - lime_weight
    if last_weight < -1e-9:
        raise InputError(f"shapley_weight + lime_weight is {1.0 - last_weight:g}: the weights are parts of 1")
    shapes = [softmax_shape(shapley, mask), softmax_shape(lime, mask), last_token_shape(mask)]
    return blend_shapes(rewards, shapes, [shapley_weight, lime_weight, last_weight], mask)


def blend_shapes(rewards: Tensor, shapes: Sequence[Tensor], weights: Sequence[float] | Tensor, mask: Tensor) -> Tensor:
    """(B, T) `R * sum_k weights[k] * shapes[k]`: sums to R where every shape (B, T) and the weights sum to 1."""
    if len(shapes) != len(weights):
        raise InputError(f"{len(shapes)} shapes but {len(weights)} weights: give one weight a shape")
    row = masked.widen(rewards.detach()).unsqueeze(-1)
    parts = [weights[k] * (row * masked.select(shape.detach(), mask)) for k, shape in enumerate(shapes)]
    return masked.select(torch.stack(parts).sum(0), mask)


def softmax_shape(attributions: Tensor, mask: Tensor) -> Tensor:
    """(B, T) softmax of attributions over a row's tokens: positive, sums to 1, always finite; zeros if empty."""
    expect_shape("attributions", attributions, mask.shape, "one attribution a token of mask")
    scores = masked.select(attributions.detach(), mask)
    top = masked.select(scores, mask, -torch.inf).amax(-1, keepdim=True) if mask.shape[-1] else scores
    powers = masked.select(torch.exp(scores - torch.where(torch.isfinite(top), top, 0.0)), mask)
    return masked.select(powers / powers.sum(-1, keepdim=True), mask)


def absolute_shape(attributions: Tensor, mask: Tensor) -> Tensor:
    """(B, T) |attribution| over the row's sum of them; uniform where all are zero; zeros if empty."""
    expect_shape("attributions", attributions, mask.shape, "one attribution a token of mask")
    sizes = masked.select(attributions.detach(), mask).abs()
    total = sizes.sum(-1, keepdim=True)
    uniform = 1.0 / masked.count(mask, -1).unsqueeze(-1).to(sizes.dtype)
    return masked.select(torch.where(total > 0, sizes / torch.where(total > 0, total, 1.0), uniform), mask)


def last_token_shape(mask: Tensor) -> Tensor:
    """(B, T) float32: 1 on the last token of each row."""
    return final_token(mask).float()


def all_coalitions(n: int) -> Tensor:
    """(2^n, n) bool: bit i of row m says whether row m keeps token i."""
    if n > EXACT_LIMIT:
        raise InputError(f"{n} tokens have 2^{n} coalitions: take sampled_shapley beyond {EXACT_LIMIT} tokens")
    return (torch.arange(2**n).unsqueeze(-1) >> torch.arange(n)) % 2 == 1


def exact_shapley(coalition_rewards: Tensor) -> Tensor:
    """(n,) Shapley values from the reward of every coalition, in the order of `all_coalitions(n)`.

        phi_i = sum over S without i of |S|! (n - |S| - 1)! / n! * (v(S with i) - v(S))

    `coalition_rewards` (2^n,). Sums to v(all) - v(none); equal contributors get equal values, a token that changes
    nothing gets 0. float64 inside.
    """
    n = max(len(coalition_rewards).bit_length() - 1, 0)
    if coalition_rewards.dim() != 1 or len(coalition_rewards) != 2**n:
        raise InputError(f"coalition_rewards has shape {tuple(coalition_rewards.shape)}: n tokens need 2^n rewards")
    v = coalition_rewards.detach().double()
    size = all_coalitions(n).sum(-1).to(v.device)
    factors = torch.tensor([1.0 / (n * math.comb(n - 1, s)) for s in range(n)], dtype=v.dtype, device=v.device)
    values = []
    for i in range(n):
        without = torch.arange(2**n, device=v.device)
        without = without[(without >> i) % 2 == 0]
        values.append((factors[size[without]] * (v[without + 2**i] - v[without])).sum())
    return torch.stack(values) if values else v.new_zeros(0)


def sampled_shapley(
    score: Score, n: int, *, permutations: int = 16, generator: torch.Generator | None = None
) -> Tensor:
    """(n,) Shapley values estimated over random orders: the mean gain of each token when it joins those before it.

    `score` is asked once an order, with the n + 1 coalitions that the order passes through, so its cost is
    permutations * (n + 1) passes. Unbiased; sums to v(all) - v(none) for every sample.
    """
    total = torch.zeros(n, dtype=torch.float64)
    for _ in range(permutations):
        order = torch.randperm(n, generator=generator)
        rank = torch.empty_like(order).scatter_(0, order, torch.arange(n))
        kept = rank < torch.arange(n + 1).unsqueeze(-1)
        gains = score(kept).detach().double().cpu().diff()
        total[order] += gains
    return total / permutations


def random_coalitions(n: int, samples: int = 64, *, generator: torch.Generator | None = None) -> Tensor:
    """(samples, n) bool: fair coins, the first row keeping everything; what LIME perturbs with."""
    kept = torch.rand(samples, n, generator=generator) < 0.5
    kept[:1] = True
    return kept


def lime_kernel(coalitions: Tensor, *, sigma: Positive = 0.25) -> Tensor:
    """(N,) weights exp(-d^2 / sigma^2), d = 1 - cos(coalition, everything kept); nothing kept has cos 0."""
    share = coalitions.double().mean(-1)
    return torch.exp(-((1.0 - share.sqrt()) ** 2) / sigma**2)


def lime_attribution(
    coalitions: Tensor, coalition_rewards: Tensor, kernel: Tensor, *, ridge: NonNegative = 1.0
) -> tuple[Tensor, Tensor]:
    """(n,) coefficients and the scalar intercept of LIME: a weighted ridge regression of rewards on what was kept.

        min over c, b of sum_m kernel_m * (rewards_m - b - coalitions_m . c)^2 + ridge * |c|^2

    `coalitions` (N, n), `coalition_rewards` (N,), `kernel` (N,) (`lime_kernel`). The intercept is not penalised.
    No sum identity: the coefficients add up to about v(all) less the intercept. float64 inside. Detached.
    """
    z = coalitions.double()
    design = torch.cat([z, torch.ones_like(z[:, :1])], -1)
    weighted = design * kernel.detach().double().unsqueeze(-1)
    penalty = torch.full((design.shape[1],), float(ridge), dtype=z.dtype, device=z.device)
    penalty[-1] = 0.0
    normal = design.T @ weighted + torch.diag(penalty)
    solution = torch.linalg.lstsq(normal, weighted.T @ coalition_rewards.detach().double()).solution
    return solution[:-1], solution[-1]


def search_shape_weights(
    objective: Callable[[Tensor], float],
    components: int,
    *,
    trials: int = 12,
    starts: int = 4,
    seed: int = 0,
    study: Any = None,
) -> tuple[Tensor, float]:
    """The best (components,) weights found, and their score: the outer loop of the paper, by Bayesian optimisation.

    `objective(weights)` is the validation score to maximise: usually a whole training run with
    `blend_shapes(..., weights, ...)`. Weights lie on the simplex; the first `starts` are Sobol points, uniform on
    it, the rest are proposed by `study`, any object with Optuna's `ask`, `tell` and `enqueue_trial`: give one with
    storage to resume. Left out, it is an Optuna study over a Gaussian process with noisy observations and log
    expected improvement; the paper's is the same model with BoTorch's log noisy expected improvement.
    """
    if study is None:
        study = _gaussian_process_study(seed)
    names = [f"u{k}" for k in range(components - 1)]
    sobol = torch.quasirandom.SobolEngine(max(len(names), 1), scramble=True, seed=seed)
    for point in sobol.draw(min(starts, trials), dtype=torch.float64).tolist():
        study.enqueue_trial(dict(zip(names, point, strict=False)))
    best = (simplex_point(torch.full((len(names),), 0.5, dtype=torch.float64)), -math.inf)
    for _ in range(trials):
        trial = study.ask()
        cube = torch.tensor([trial.suggest_float(name, 0.0, 1.0) for name in names], dtype=torch.float64)
        weights = simplex_point(cube)
        value = float(objective(weights))
        study.tell(trial, value)
        if value > best[1]:
            best = (weights, value)
    return best


def simplex_point(cube: Tensor) -> Tensor:
    """(k,) non-negative weights that sum to 1 from (k - 1,) numbers in [0, 1]; uniform numbers give uniform points."""
    rest, weights = torch.ones((), dtype=cube.dtype), []
    for i, u in enumerate(cube):
        share = 1.0 - (1.0 - u) ** (1.0 / (len(cube) - i))
        weights.append(rest * share)
        rest = rest - weights[-1]
    return torch.stack([*weights, rest])


def _gaussian_process_study(seed: int) -> Any:
    try:
        import optuna
    except ImportError as error:
        raise InputError(
            "search_shape_weights needs Optuna: pip install optuna, or give study= with ask, tell and enqueue_trial"
        ) from error
    sampler = optuna.samplers.GPSampler(seed=seed, n_startup_trials=1, deterministic_objective=False)
    return optuna.create_study(direction="maximize", sampler=sampler)
