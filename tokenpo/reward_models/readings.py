"""What the outputs of a reward model mean: per-token values and a score, by the model's stated reading.

| reading | head | trained on | value of token t | its reward, where another | score of the response |
|---|---|---|---|---|---|
| last_token | scalar | pairs, Bradley-Terry | the head after t | the score, at the end | the head after the end |
| prefixes | scalar | the same | how much t moved the head (RED) | | the same |
| segments | scalar | pairs, at segment ends | its share of its segment's normalised value | | mean over segment ends |
| token_classes | classes | edits, spans, steps | expected worth of its class | | mean over tokens |
| values | classes | outcomes, at every token | V_t = P(correct) after t | V_t - V_{t-1} | V after the end |
| implicit | none | outcomes | beta * log-ratio to the reference | | their sum |

All are detached and read no token id; masked tokens have value 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from tokenpo import masked
from tokenpo.credit.basic import final_token, last_token_rewards, value_differences
from tokenpo.credit.implicit import implicit_rewards
from tokenpo.credit.segments import entropy_segments, segment_ends, segment_rewards
from tokenpo.errors import InputError
from tokenpo.methods import nearest
from tokenpo.reward_models.normaliser import LocationNormaliser
from tokenpo.reward_models.outcomes import CORRECT

CLASSES = {"token_classes": ("bad", "good"), "values": ("incorrect", "correct")}
WORTHS = {"bad": -1.0, "good": 1.0, "correct": 0.0, "minor": -1.0, "major": -5.0, "critical": -10.0}
"""What a token of a class is worth; the severities as in MQM."""
SEVERITIES = ("correct", "minor", "major", "critical")


@dataclass(frozen=True)
class Outputs:
    """What a forward says of B responses of at most T tokens, (B, T) `mask`.

    `logits` (B, T + 1, k) of the head, column 0 after the prompt alone, column t + 1 after response token t; None
    without a head. `entropy`, `logps`, `ref_logps` (B, T): nats, where the reading needs them.
    """

    mask: Tensor
    logits: Tensor | None = None
    entropy: Tensor | None = None
    logps: Tensor | None = None
    ref_logps: Tensor | None = None

    @property
    def scalars(self) -> Tensor:
        """(B, T + 1) the value of a head with one output, after every prefix."""
        assert self.logits is not None
        return masked.widen(self.logits).squeeze(-1)


@dataclass(frozen=True)
class Reading:
    """A reading and its settings, kept in the model's config.json.

    `classes` of a head with classes; `threshold` of entropy in nats at which a segment starts, and the `normaliser`
    of segment values, fitted after training; `beta` of the implicit reading.
    """

    name: str = "last_token"
    classes: tuple[str, ...] = ()
    threshold: float = 2.0
    normaliser: LocationNormaliser | None = None
    least_std: float = 0.1
    beta: float = 0.05

    def __post_init__(self) -> None:
        if self.name not in READINGS:
            raise InputError(f"unknown reading '{self.name}'{nearest(self.name, READINGS)}")
        if self.name in CLASSES and not self.classes:
            object.__setattr__(self, "classes", CLASSES[self.name])
        if self.name == "values" and not (len(self.classes) >= 2 and self.classes[CORRECT] == "correct"):
            raise InputError(f"reading 'values' has the class 'correct' at place {CORRECT}, got {self.classes}")
        if self.name == "token_classes" and not set(self.classes) <= set(WORTHS):
            raise InputError(f"classes of tokens are {', '.join(WORTHS)}, got {', '.join(self.classes)}")
        if not self.threshold >= 0 or not self.least_std > 0 or not self.beta > 0:
            raise InputError("of a reading, threshold is at least 0, least_std and beta are positive")

    @property
    def outputs(self) -> int:
        """How many outputs the head has; 0: no head."""
        return 0 if self.name == "implicit" else max(len(self.classes), 1)

    @property
    def reads_reference(self) -> bool:
        """Whether a frozen language model is read too: for the cuts of segments, or for log-ratios."""
        return self.name in ("segments", "implicit")

    def as_dict(self) -> dict[str, Any]:
        normaliser = None if self.normaliser is None else self.normaliser._asdict()
        return {**asdict(self), "classes": list(self.classes), "normaliser": normaliser}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Reading:
        """The inverse of `as_dict`; a setting that does not exist is named."""
        known = cls.__dataclass_fields__
        for key in values:
            if key not in known:
                raise InputError(f"a reading has no setting '{key}'{nearest(key, known)}")
        given = dict(values)
        if given.get("normaliser") is not None:
            given["normaliser"] = LocationNormaliser(**given["normaliser"])
        given["classes"] = tuple(given.get("classes") or ())
        try:
            return cls(**given)
        except TypeError as reason:
            raise InputError(f"the settings of a reading: {reason}") from reason

    def token_values(self, outputs: Outputs) -> Tensor:
        """(B, T) per-token values, zero off the mask."""
        return READINGS[self.name][0](self, outputs).detach()

    def token_rewards(self, outputs: Outputs) -> Tensor:
        """(B, T) what each token earned: the values, or for readings whose values are levels what they pay out."""
        if self.name == "last_token":
            return last_token_rewards(self.scores(outputs), outputs.mask)
        if self.name == "values":
            return value_differences(_correct(outputs), outputs.mask)
        return self.token_values(outputs)

    def scores(self, outputs: Outputs) -> Tensor:
        """(B,) one number a response; 0 for an empty one."""
        return READINGS[self.name][1](self, outputs).detach()

    def prefix_values(self, outputs: Outputs) -> Tensor:
        """(B, T + 1) the value of every prefix, column 0 that of the prompt alone: what RED and value differences read.

        Errors: InputError for a reading that gives prefixes no value.
        """
        if self.name in ("last_token", "prefixes"):
            return outputs.scalars.detach()
        if self.name == "values":
            return _correct(outputs).detach()
        raise InputError(
            f"a reward model read as '{self.name}' gives prefixes no value: take last_token, prefixes or values"
        )


def _levels(reading: Reading, outputs: Outputs) -> Tensor:
    return masked.select(outputs.scalars[:, 1:], outputs.mask)


def _at_end(reading: Reading, outputs: Outputs) -> Tensor:
    return masked.sum(outputs.scalars[:, 1:], final_token(outputs.mask), -1)


def _differences(reading: Reading, outputs: Outputs) -> Tensor:
    return value_differences(outputs.scalars, outputs.mask)


def _segment_shares(reading: Reading, outputs: Outputs) -> Tensor:
    assert outputs.entropy is not None
    numbers = {} if reading.normaliser is None else reading.normaliser._asdict()
    return segment_rewards(
        outputs.scalars[:, 1:], outputs.entropy, outputs.mask, threshold=reading.threshold, **numbers,
        least_std=reading.least_std,
    )  # fmt: skip


def _segment_mean(reading: Reading, outputs: Outputs) -> Tensor:
    assert outputs.entropy is not None
    ends = segment_ends(entropy_segments(outputs.entropy, outputs.mask, threshold=reading.threshold))
    return masked.mean(outputs.scalars[:, 1:], ends, -1)


def _worths(reading: Reading, outputs: Outputs) -> Tensor:
    assert outputs.logits is not None
    chances = masked.widen(outputs.logits[:, 1:]).softmax(-1)
    worths = torch.tensor([WORTHS[c] for c in reading.classes], dtype=chances.dtype, device=chances.device)
    return masked.select((chances * worths).sum(-1), outputs.mask)


def _mean_worth(reading: Reading, outputs: Outputs) -> Tensor:
    return masked.mean(_worths(reading, outputs), outputs.mask, -1)


def _correct(outputs: Outputs) -> Tensor:
    """(B, T + 1) the chance of a correct outcome after every prefix."""
    assert outputs.logits is not None
    return masked.widen(outputs.logits).softmax(-1)[..., CORRECT]


def _values(reading: Reading, outputs: Outputs) -> Tensor:
    return masked.select(_correct(outputs)[:, 1:], outputs.mask)


def _final_value(reading: Reading, outputs: Outputs) -> Tensor:
    return masked.sum(_correct(outputs)[:, 1:], final_token(outputs.mask), -1)


def _ratios(reading: Reading, outputs: Outputs) -> Tensor:
    assert outputs.logps is not None and outputs.ref_logps is not None
    return implicit_rewards(outputs.logps, outputs.ref_logps, outputs.mask, beta=reading.beta)


def _summed_ratios(reading: Reading, outputs: Outputs) -> Tensor:
    return _ratios(reading, outputs).sum(-1)


Read = Callable[[Reading, Outputs], Tensor]
READINGS: dict[str, tuple[Read, Read]] = {
    "last_token": (_levels, _at_end),
    "prefixes": (_differences, _at_end),
    "segments": (_segment_shares, _segment_mean),
    "token_classes": (_worths, _mean_worth),
    "values": (_values, _final_value),
    "implicit": (_ratios, _summed_ratios),
}
"""Reading -> (values of tokens, score of the response)."""
