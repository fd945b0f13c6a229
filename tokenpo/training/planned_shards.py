"""A step whose weights, gradients and optimizer are shared out over several cards (FSDP2, ZeRO-3), on one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tokenpo.training.dry_run import layers_of
from tokenpo.training.plan import size
from tokenpo.training.tally import Segment

SHARED_OUT = ("weights", "quantisation state", "adapters", "gradients", "optimiser")


class Shards(NamedTuple):
    """`cards` in number; `widen`: bytes of a stored weight over those of the dtype in which it is gathered."""

    cards: int
    widen: float = 1.0


def sharded_standing(parts: Mapping[str, int], shards: Shards) -> dict[str, int]:
    """What stands on one card: its share of the policy in the stored dtype, and the whole of every frozen model."""
    share = shards.widen / shards.cards
    factor = dict.fromkeys(SHARED_OUT, share) | {"reference": shards.widen, "teachers": shards.widen}
    return {part: int(held * factor.get(part, 1.0)) for part, held in parts.items()}


def sharded_segments(model: Any, segments: Sequence[Segment], shards: Shards) -> list[Segment]:
    """Embeddings, norm and head are gathered for the whole step, a layer while it runs together with the next one.

    After a layer's backward its gradients are added up over the cards, and a share of them stays.
    """
    layers = layers_of(model)
    widest = max(size(layer.parameters()) for layer in layers)
    root = size(model.parameters()) - sum(size(layer.parameters()) for layer in layers)
    found = [Segment("embeddings and head are gathered", {"weights": root}, root, "weights")]
    for s in segments:
        if s.name.startswith("layer"):
            kept = dict(s.kept)
            kept["gradients"] = int(kept.get("gradients", 0) * shards.widen / shards.cards)
            s = Segment(s.name, kept, s.rise + 2 * widest, s.part)
        found.append(s)
    return found
