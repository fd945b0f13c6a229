"""From measured policies to a curve: reward at equal KL, areas, and when a difference may be called one."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

from tokenpo.errors import InputError
from tokenpo.evaluation.frontier import frontier_area, hypervolume, pareto_front
from tokenpo.evaluation.frontier_policy import Measured
from tokenpo.evaluation.intervals import Difference, Interval, mean_interval, paired_difference

LEAST_SEEDS = 5
"""With fewer, nothing is called a difference: signs that agree by chance on four seeds are one case in eight."""

Curves = Mapping[int, Sequence[Measured]]
"""Seed -> the measured policies of one loss, of all strengths and steps; the start is added here."""


def front(points: Sequence[Measured], start: Measured) -> list[Measured]:
    """The start and the policies that no other beats in reward within their KL, by rising KL; only finite ones."""
    kept = {(p.kl, p.reward): p for p in (*points, start) if math.isfinite(p.kl) and math.isfinite(p.reward)}
    return [kept[place] for place in pareto_front(list(kept))]


def at_kl(points: Sequence[Measured], start: Measured, kl: float, what: str = "reward") -> float:
    """`what` (reward or entropy) of the front at a KL; NaN if no policy went so far.

    Between two policies of the front it is taken linearly in the square root of KL: near the start the best reward
    grows with that root, so this is exact there. Behind the last one the front stays level: with less KL its reward
    was reached.
    """
    if not kl > 0:
        raise InputError(f"kl must be positive, got {kl}")
    if not any(p.kl >= kl for p in points):
        return math.nan
    line = front(points, start)
    i = bisect_left([p.kl for p in line], kl)
    if i == len(line):
        return float(getattr(line[-1], what))
    if i == 0:
        return float(getattr(line[0], what))
    left, right = line[i - 1], line[i]
    share = (math.sqrt(kl) - math.sqrt(left.kl)) / (math.sqrt(right.kl) - math.sqrt(left.kl))
    return float((1 - share) * getattr(left, what) + share * getattr(right, what))


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Mean of ours less theirs over the seeds where both are defined, paired, with its bootstrap interval.

    The interval is NaN, so that no difference is shown, with fewer than LEAST_SEEDS of them.
    """
    both = [(a, b) for a, b in zip(ours, theirs, strict=True) if math.isfinite(a) and math.isfinite(b)]
    if len(both) < LEAST_SEEDS:
        gaps = [a - b for a, b in both]
        return Difference(math.fsum(gaps) / len(gaps) if gaps else math.nan, math.nan, math.nan)
    return paired_difference(lambda x: x.mean(), [a for a, _ in both], [b for _, b in both])


def verdict(differences: Sequence[Difference]) -> str:
    """Of differences at several KLs: "higher" or "lower" where some are and none is the other way, "mixed", or none.

    "not reached" where one of the two losses went to none of these KLs.
    """
    if not any(math.isfinite(d.value) for d in differences):
        return "not reached"
    found = {d.verdict for d in differences} - {"no difference shown"}
    return "mixed" if len(found) > 1 else next(iter(found), "no difference shown")


def interval(values: Sequence[float]) -> Interval:
    """Mean over the seeds where it is defined, with its bootstrap interval; NaN where it is defined for none."""
    known = [v for v in values if math.isfinite(v)]
    return mean_interval(known) if known else Interval(math.nan, math.nan, math.nan)


def summarise(
    curves: Curves, finals: Curves, starts: Mapping[int, Measured], best: Curves, *, kls: Sequence[float], limit: float
) -> dict[str, Any]:
    """One loss: values a seed, which differences are taken of, and their means with intervals.

    `finals`: the policies at the end of training alone. `best`: the optimum of each seed. "area": mean reward gained
    over KL up to `limit` (`frontier_area`); "share": of the optimum's; "hypervolume"; "final_area" of the ends alone;
    "reward@KL" and "entropy@KL" (`at_kl`) for each of `kls`.
    """
    columns: dict[str, list[float]] = {}
    for seed, points in curves.items():
        start = starts[seed]
        area = area_of(points, start, limit)
        row = {
            "area": area,
            "share": area / area_of(best[seed], start, limit),
            "hypervolume": hypervolume(_plane(points), kl_limit=limit, reward_floor=start.reward),
            "final_area": area_of(finals[seed], start, limit),
            "furthest_kl": max((p.kl for p in points if math.isfinite(p.kl)), default=0.0),
        }
        for kl in kls:
            row |= {f"{what}@{kl:g}": at_kl(points, start, kl, what) for what in ("reward", "entropy")}
        for key, value in row.items():
            columns.setdefault(key, []).append(value)
    return {key: {"seeds": values, **as_json(interval(values))} for key, values in columns.items()}


def area_of(points: Sequence[Measured], start: Measured, limit: float) -> float:
    """`frontier_area` of the finite points."""
    return frontier_area(_plane(points), kl_limit=limit, start_reward=start.reward)


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """Differences of two summaries of the same seeds, by key, and the verdict over all keys."""
    found = {key: difference(ours[key]["seeds"], theirs[key]["seeds"]) for key in keys}
    rows = {key: {**as_json(d), "verdict": d.verdict} for key, d in found.items()}
    return {"at": rows, "verdict": verdict(list(found.values()))}


def as_json(found: Interval) -> dict[str, Any]:
    """{value, interval}."""
    return {"value": found.value, "interval": found.as_list()}


def _plane(points: Sequence[Measured]) -> list[tuple[float, float]]:
    return [(p.kl, p.reward) for p in points if math.isfinite(p.kl) and math.isfinite(p.reward)]
