"""Under a frozen head: gradients of log-probs and KL(ref || policy) whose products are done in the forward sweep.

With E_p[W] = sum_v p_v W_v, the expected row of the head, and gain = scale / temperature,
d logps / dh = gain (W_y - E_p[W]) and d ref_kl / dh = gain (E_p[W] - E_q[W]).
Both expectations are (N, d) sums over tiles like the normalisers, so no tile is built again for the backward pass: DPO
takes 3 products of the head's size in place of 4, TDPO2 4 in place of 5. A trained head needs the tiles again anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from tokenpo.statistics.gradient import add_product
from tokenpo.statistics.head import LinearHead
from tokenpo.statistics.tiles import Plan, Sweep, Tile

# Other outputs may be asked for beside these: where they have a gradient too, the tiles are swept again as usual.
SERVED = ("logps", "ref_kl")
# These are asked for because they will be differentiated.
PREVENT = ("policy_kl", "log_p2")


def pays(outputs: Iterable[str], hidden: Tensor, head: LinearHead, skip_below: float) -> bool:
    """Whether a gradient is to come that the expected rows can serve."""
    names = set(outputs)
    trained = head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad)
    return (
        torch.is_grad_enabled() and hidden.requires_grad and not trained
        and head.softcap is None and not skip_below
        and not names.isdisjoint(SERVED) and names.isdisjoint(PREVENT)
    )  # fmt: skip


def new_sums(sweep: Sweep) -> dict[str, Tensor]:
    """Zeros (N, d) for E_p[W], and for E_q[W] where the KL is asked for."""
    names = ["p", "q"] if "ref_kl" in sweep.plan.outputs else ["p"]
    return {name: torch.zeros_like(sweep.policy.hidden, dtype=sweep.plan.dtype) for name in names}


def add(total: Tensor, tile: Tile, weights: Tensor, shrink: Tensor, spare: Tensor) -> None:
    """total = shrink * total + weights W on the tile's rows, in place; weights (rows, columns), shrink (rows,).

    `spare` is of the shape of `weights` and of the product's dtype: they are cast into it, if it is another.
    """
    part = total[tile.rows]
    risen = (shrink != 1).nonzero()[:, 0]  # few: after k tiles, one row in k has a new peak
    part.index_copy_(0, risen, part[risen] * shrink[risen, None])
    add_product(part, slice(None), weights if weights.dtype == spare.dtype else spare.copy_(weights), tile.weight)


def finish(sums: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """E_p[W] and E_q[W] by "p" and "q": the sums divided by the normalisers sum_p and sum_q."""
    return {name: total / state[f"sum_{name}"][:, None] for name, total in sums.items()}


def gradient(
    plan: Plan, upstream: Mapping[str, Tensor], tokens: Tensor, weight: Tensor, rows: Mapping[str, Tensor]
) -> Tensor:
    """The gradient of hidden (N, d), in the dtype of sums; `rows` are the expected ones, `upstream` of `SERVED`."""
    gain = plan.policy.scale / plan.temperature
    found = torch.zeros_like(rows["p"])
    if "logps" in upstream:
        taken = weight[tokens].to(plan.policy.dtype)
        found.add_((taken - rows["p"]).mul_(gain * upstream["logps"][:, None]))
    if "ref_kl" in upstream:
        found.add_((rows["p"] - rows["q"]).mul_(gain * upstream["ref_kl"][:, None]))
    return found
