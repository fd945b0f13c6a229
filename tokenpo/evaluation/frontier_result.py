"""What came out of the frontier benchmark, from the finished cells: curves, areas, differences, claims, checks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tokenpo.evaluation.frontier_claims import CLAIMS, found_of
from tokenpo.evaluation.frontier_curves import (
    LEAST_SEEDS,
    Curves,
    as_json,
    at_kl,
    differences,
    interval,
    summarise,
)
from tokenpo.evaluation.frontier_ladders import ladder, loss_of
from tokenpo.evaluation.frontier_policy import Measured

BETAS = tuple(64.0 * 0.89**i for i in range(64))
"""Of the optima that make up the best possible front: 64 down to 0.04."""


def cell_name(name: str, strength: float, seed: int) -> str:
    """Of the training of a loss at a strength and a seed."""
    return f"{name}-x{strength:g}-s{seed}"


def compare(
    plan: Mapping[str, Any], found: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, list[float]]]:
    """The result as JSON values (numbers may be NaN), the curves of the picture by loss, and those of the optimum."""
    seeds, kls = plan["seeds"], plan["kls"]
    starts = {seed: measured(found[f"start-s{seed}"]["start"]) for seed in seeds}
    best = {seed: [measured(m) for m in found[f"start-s{seed}"]["best"]] for seed in seeds}
    options: dict[str, Any] = {"starts": starts, "best": best, "kls": kls, "limit": kls[-1]}
    points = {name: points_of(plan, found, name, slice(None)) for name in plan["losses"]}
    losses = {}
    for name, every in points.items():
        ends = points_of(plan, found, name, slice(-1, None))
        losses[name] = {"summary": summarise(every, ends, **options), **settings_of(plan, found, name)}
    for name, loss in losses.items():
        loss["against_dpo"] = set_against(losses, name, "dpo", "reward", kls)
        loss["claims"] = claims_of(losses, name, kls)
    grid = [kls[-1] * (i / 40) ** 2 for i in range(1, 41)]
    result = {
        **plan,
        "kl_limit": kls[-1],
        "least_seeds": LEAST_SEEDS,
        "start": {
            **{what: mean([getattr(starts[s], what) for s in seeds]) for what in ("reward", "entropy")},
            "kl_to_chain": mean([found[f"start-s{s}"]["kl_to_chain"] for s in seeds]),
        },
        "optimum": summarise(best, best, **options),
        "checks": checks(points, best, losses, kls),
        "losses": losses,
    }
    return result, {n: line(c, starts, grid) for n, c in points.items()}, line(best, starts, grid)


def measured(row: Sequence[float | None]) -> Measured:
    """A stored (kl, reward, entropy); None stands for a number that was not finite."""
    return Measured(*(math.nan if v is None else float(v) for v in row))


def points_of(plan: Mapping[str, Any], found: Mapping[str, Any], name: str, steps: slice) -> dict[int, list[Measured]]:
    """Seed -> the policies of all strengths of a loss; `steps`: which of those along a training."""
    return {
        seed: [
            measured(row[1:])
            for strength in plan["strengths"]
            for row in found[cell_name(name, strength, seed)]["points"][steps]
        ]
        for seed in plan["seeds"]
    }


def settings_of(plan: Mapping[str, Any], found: Mapping[str, Any], name: str) -> dict[str, Any]:
    """How the loss was set, its accuracy at the strength nearest 1, and where each strength ended."""
    steps, seeds = ladder(name, plan["task"]["length"]), plan["seeds"]
    usual = min(plan["strengths"], key=lambda s: abs(math.log(s)))
    cells = {s: [found[cell_name(name, s, seed)] for seed in seeds] for s in plan["strengths"]}
    ends = {}
    for strength, rows in cells.items():
        last = [measured(row["points"][-1][1:]) for row in rows]
        ends[f"{strength:g}"] = {what: mean([getattr(m, what) for m in last]) for what in Measured._fields}
    shown = steps.argument or "learning rate"
    base = plan["task"]["learning_rate"] if steps.argument is None else 1.0
    return {
        "strength_by": f"{shown} {steps.value(1.0) * base:g}",
        "arguments": cells[usual][0]["arguments"],
        "paper": loss_of(name).paper,
        "accuracy": as_json(interval([row["accuracy"] for row in cells[usual]])),
        "ends": ends,
    }


def set_against(
    losses: Mapping[str, Any], name: str, other: str, what: str, kls: Sequence[float]
) -> dict[str, Any] | None:
    """Differences at equal KL between two losses; None where the other one was not trained."""
    if other not in losses or other == name:
        return None
    return differences(losses[name]["summary"], losses[other]["summary"], [f"{what}@{kl:g}" for kl in kls])


def claims_of(losses: Mapping[str, Any], name: str, kls: Sequence[float]) -> list[dict[str, Any]]:
    """The paper's claims beside what was found."""
    rows = []
    for claim in CLAIMS.get(name, ()):
        against = set_against(losses, name, claim.against, claim.what, kls)
        if against is not None:
            rows.append({**claim._asdict(), **against, "found": found_of(claim, against["verdict"])})
    return rows


def checks(
    points: Mapping[str, Curves],
    best: Curves,
    losses: Mapping[str, Any],
    kls: Sequence[float],
) -> dict[str, Any]:
    """What the benchmark must show of itself.

    `excess`: the most by which a policy's reward - beta * KL exceeds the optimum's at any beta, which bounds it;
    `same_as_dpo`: the most by which losses that are DPO on responses of one length differ from it at equal KL.
    """
    every = [(seed, m) for curves in points.values() for seed, ms in curves.items() for m in ms]
    known = [(seed, m) for seed, m in every if math.isfinite(m.kl)]
    gaps = (
        m.reward - b.reward - beta * (m.kl - b.kl)
        for seed, m in known
        for beta, b in zip(BETAS, best[seed], strict=True)
    )
    twins = [n for n in ("ld_dpo", "dpo_norm") if n in losses and "dpo" in losses]
    keys = [f"reward@{kl:g}" for kl in kls]
    pairs = [
        (a, b) for n in twins for key in keys
        for a, b in zip(losses[n]["summary"][key]["seeds"], losses["dpo"]["summary"][key]["seeds"], strict=True)
    ]  # fmt: skip
    same = max((abs(a - b) for a, b in pairs if math.isfinite(a - b)), default=0.0) if twins else None
    return {
        "policies": len(every),
        "not_finite": len(every) - len(known),
        "excess": max(gaps, default=0.0),
        "same_as_dpo": same,
    }


def line(curves: Curves, starts: Mapping[int, Measured], grid: Sequence[float]) -> dict[str, list[float]]:
    """A mean curve over seeds on a grid of KL, NaN where a seed did not go so far."""
    found: dict[str, list[float]] = {"kl": list(grid)}
    for what in ("reward", "entropy"):
        found[what] = [mean([at_kl(points, starts[s], kl, what) for s, points in curves.items()]) for kl in grid]
    return found


def mean(values: Sequence[float]) -> float:
    """NaN where one of them is."""
    return math.fsum(values) / len(values)
