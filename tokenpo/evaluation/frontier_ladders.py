"""Which losses the frontier benchmark trains, and how strong each is set."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from tokenpo import methods

GUIDE_BETA = 1.0
"""Beta of the DPO models that other losses read."""

COMPANIONS: dict[str, tuple[str, bool]] = {
    "guide": ("dpo", False),
    "reverse": ("dpo", True),
    "positive": ("sft", False),
    "negative": ("sft", True),
}
"""Name -> (loss it is trained with, whether chosen and rejected are exchanged)."""


@dataclass(frozen=True)
class Ladder:
    """The number that sets how far a loss goes: `base` at strength 1, `base / strength`, or times it if `rising`.

    `argument` None: the loss has no such number, and the learning rate takes its place.
    """

    argument: str | None = "beta"
    base: float = 1.0
    rising: bool = False

    def value(self, strength: float) -> float:
        return self.base * strength if self.rising else self.base / strength


MEANS = ("dpo_norm", "simpo", "t_reg_simpo", "ipo", "bmc_ipo")
"""Losses over means of tokens: they want a beta as many times larger as a response has tokens."""
LADDERS: dict[str, Ladder] = {
    "tdpo2": Ladder(base=0.25),
    "ra_dpo2": Ladder(base=0.25),
    "kto": Ladder(base=0.5),
    "apo_zero_unpaired": Ladder(base=0.5),
    "bmc": Ladder(base=0.5),
    "bmc_own_weights": Ladder(base=0.5),
    "sparsepo": Ladder(base=4.0),
    "sparsepo_common": Ladder(base=4.0),
    "ipo": Ladder(base=0.125),
    "bmc_ipo": Ladder(base=0.0625),
    "ipo_sum": Ladder(base=0.125),
    "critical_dpo": Ladder("gamma"),
    "critical_dpo_per_position": Ladder("gamma", base=0.5),
    "orpo": Ladder(base=4.0, rising=True),
    "orpo_with_prompt": Ladder(base=4.0, rising=True),
    "aligndistil": Ladder("r", rising=True),
    "aligndistil_constant": Ladder("kl_coef"),
    "aligndistil_theorem1": Ladder("kl_coef"),
    "sft": Ladder(None, rising=True),
    "meet": Ladder(None, rising=True),
}
"""Where it is not beta at 1. Bases were set so that the strengths around them go about as far as DPO's do (KL, not
reward), on a task that is none of the benchmark's."""
FIXED: dict[str, dict[str, Any]] = {
    "aligndistil": {"beta": GUIDE_BETA, "floor": 0.1},
    "aligndistil_constant": {"beta": GUIDE_BETA},
    "aligndistil_theorem1": {"beta": GUIDE_BETA},
}
"""Other arguments than a method's defaults: the teachers' beta; AlignDistil's floor as for the embedded model."""
VARIANTS = {"sparsepo+mapo": ("sparsepo", "mapo")}
"""Name -> (loss, where its weights come from), beside the losses with what they were published with."""


KINDS = (
    "pairwise", "pairwise_with_prompt", "unpaired", "prompt_pairs", "supervised", "controlled_pairs", "distillation"
)  # fmt: skip
"""Kinds of methods that train on stored pairs: those of `tokenpo.training.ENGINES`."""


def offline_losses() -> list[str]:
    """Every registered loss that trains on stored pairs, and the variants."""
    known = methods.all_methods()
    return sorted([*(name for name, method in known.items() if method.kind in KINDS), *VARIANTS])


def loss_of(name: str) -> methods.Method:
    """The method behind a name of `offline_losses`."""
    return methods.get(VARIANTS[name][0] if name in VARIANTS else name)


def ladder(name: str, length: int) -> Ladder:
    """How the strength of a loss is set, for responses of `length` tokens."""
    method = loss_of(name)
    usual = Ladder() if "beta" in method.hyperparameters else Ladder(None, rising=True)
    found = LADDERS.get(method.name, usual)
    return dataclasses.replace(found, base=found.base * length) if method.name in MEANS else found


def arguments_of(name: str, strength: float, length: int) -> dict[str, Any]:
    """What the loss is called with at a strength; its own defaults for the rest."""
    method, steps = loss_of(name), ladder(name, length)
    given = dict(FIXED.get(method.name, {}))
    return given if steps.argument is None else {**given, steps.argument: steps.value(strength)}
