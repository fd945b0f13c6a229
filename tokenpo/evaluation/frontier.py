"""Reward against KL: which points are worth having, and how much of the plane a method commands."""

from __future__ import annotations

from collections.abc import Sequence

from tokenpo.errors import InputError

Point = tuple[float, float]
"""(kl, reward): less of the first and more of the second is better."""


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats (no more KL and no less reward), by rising KL; equal points once."""
    front: list[Point] = []
    for kl, reward in sorted(set(points), key=lambda p: (p[0], -p[1])):
        if not front or reward > front[-1][1]:
            front.append((kl, reward))
    return front


def frontier_area(points: Sequence[Point], *, kl_limit: float, start_reward: float) -> float:
    """Mean over KL in [0, kl_limit] of (the best reward within that KL) - `start_reward`, in units of reward.

    The start (KL 0, `start_reward`) belongs to every method. Between points the reward is that of the last one passed:
    what was measured, nothing interpolated. To compare methods, give all of them the same limit and start.
    """
    if not kl_limit > 0:
        raise InputError(f"kl_limit must be positive, got {kl_limit}")
    return hypervolume([(0.0, start_reward), *points], kl_limit=kl_limit, reward_floor=start_reward) / kl_limit


def hypervolume(points: Sequence[Point], *, kl_limit: float, reward_floor: float) -> float:
    """Area of all (kl, reward) that some point beats, within kl <= `kl_limit` and reward >= `reward_floor`."""
    inside = [(kl, reward) for kl, reward in pareto_front(points) if kl < kl_limit and reward > reward_floor]
    if not inside:
        return 0.0
    ends = [kl for kl, _ in inside[1:]] + [kl_limit]
    return sum((end - kl) * (reward - reward_floor) for (kl, reward), end in zip(inside, ends, strict=True))
