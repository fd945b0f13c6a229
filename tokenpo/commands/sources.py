"""The credit sources that are asked once over the pairs before training, by name."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from tokenpo import credit
from tokenpo.commands import explain, scorers, tool_turns
from tokenpo.commands.first import Changes, dpo, reverse_sft, sft
from tokenpo.commands.inputs import INPUTS
from tokenpo.commands.reader import Reader
from tokenpo.methods import keyword_only
from tokenpo.reward_models import READINGS


@dataclasses.dataclass(frozen=True)
class Source:
    """A credit source.

    `score(reader, **settings)` gives (2P, T) values of the `field`; `settings` has its settings as keyword-only
    arguments. `models`: keys of the configuration that name a model, of which `required` must be there. `trained`:
    for a model that is not given, the folder of the run where one is trained first, and how. `heads`: as what the
    reward model behind a key may be read (`tokenpo.reward_models.READINGS`). `columns`: those that the data must have.
    """

    field: str
    score: Callable[..., Tensor]
    settings: Callable[..., Any]
    models: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    trained: dict[str, tuple[str, Changes]] = dataclasses.field(default_factory=dict)
    heads: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    columns: tuple[str, ...] = ()


def plain(function: Callable[..., Tensor], **options: Any) -> Source:
    """A registered function as a source: each argument is what `INPUTS` has under its name."""
    names = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]

    def score(reader: Reader, **settings: Any) -> Tensor:
        return function(*(reader(name) for name in names), **settings)

    unknown = [name for name in names if name not in INPUTS]
    if unknown:
        raise TypeError(f"{function.__name__} reads {unknown[0]}, which commands/inputs.py does not make")
    return Source("token_rewards", score, function, **options)


def made(score: Callable[..., Tensor], field: str = "token_rewards", **options: Any) -> Source:
    """A function of `tokenpo.commands.scorers`, `tool_turns` or `explain` as a source."""
    return Source(field, score, score, **options)


ANY = tuple(READINGS)
PREFIXES = ("last_token", "prefixes", "values")
"""Readings of reward models that give every prefix a value."""
REWARD: dict[str, Any] = {"models": ("reward_model",), "heads": {"reward_model": ANY}}
"""The sequence reward may come from a model."""
SCORED: dict[str, Any] = {"models": ("model",), "required": ("model",), "heads": {"model": PREFIXES}}
"""Reads the reward model named, at every position."""
VALUED: dict[str, Any] = {
    "models": ("model", "reward_model"), "required": ("model",), "heads": {"model": PREFIXES, "reward_model": ANY}
}  # fmt: skip
"""Reads a value model, and the sequence reward."""
ATTENDED: dict[str, Any] = {"models": ("model", "reward_model"), "heads": {"reward_model": ANY}}
"""Reads the attention of the model that training starts from, or of the one named."""
GUIDED: dict[str, Any] = {"models": ("model", "reference"), "trained": {"model": ("guide", dpo)}}
"""Reads a guide, trained with DPO first if none is named, and its reference: the model that training starts from."""
RETURNED: dict[str, Any] = {**GUIDED, "models": ("model", "reference", "reward_model"), "heads": {"reward_model": ANY}}
RTO: dict[str, Any] = {**RETURNED, "models": (*RETURNED["models"], "sampler")}
"""`sampler` wrote the responses; left out, it is the reference, and the KL term is zero."""
SPANS = ("chosen_error_spans", "rejected_error_spans")
CALLS = ("gold_calls", "chosen_predicted_calls", "rejected_predicted_calls")

SOURCES: dict[str, Source] = {
    "implicit": made(scorers.implicit, **GUIDED),
    "bellman": made(scorers.bellman, **GUIDED),
    "expected_implicit": made(scorers.expected_implicit, **GUIDED),
    "prime": made(scorers.prime, **GUIDED),
    "prime_whole": made(scorers.prime_whole, **GUIDED),
    "prime_returns": made(scorers.prime_returns, **RETURNED),
    "prime_released_returns": made(scorers.prime_released_returns, **RETURNED),
    "rto": plain(credit.rto_rewards, **RTO),
    "rto_last": plain(credit.rto_last_rewards, **RTO),
    "rto_shaped": plain(credit.rto_shaped_rewards, **RTO),
    "rto_segment": made(scorers.rto_segment, **RTO),
    "contrastive_prompt": made(scorers.contrastive_prompt, models=("model",)),
    "contrastive_scores": made(
        scorers.contrastive_scores,
        "token_weights",
        models=("positive", "negative"),
        trained={"positive": ("positive", sft), "negative": ("negative", reverse_sft)},
    ),
    "modified_tokens": made(scorers.modified_tokens, "token_weights"),
    "last_token": plain(credit.last_token_rewards, **REWARD),
    "uniform": plain(credit.uniform_rewards, **REWARD),
    "abc": plain(credit.abc_rewards, **ATTENDED),
    "abc_d": plain(credit.abc_d_rewards, **ATTENDED),
    "abc_d_last": plain(credit.abc_d_last_rewards, **ATTENDED),
    "red": plain(credit.red_rewards, **SCORED),
    "red_full": plain(credit.red_full_rewards, **SCORED),
    "red_zero": plain(credit.red_zero_rewards, **SCORED),
    "red_two_models": plain(
        credit.red_two_model_rewards,
        models=("model", "cost_model"),
        required=("model", "cost_model"),
        heads={"model": PREFIXES, "cost_model": PREFIXES},
    ),
    "value_differences": plain(credit.value_differences, **SCORED),
    "potential_shaping": plain(credit.potential_shaping, **VALUED),
    "gae": made(scorers.gae, **VALUED),
    "explainable_dense": made(explain.explainable_dense, **SCORED),
    "segment_reward": made(
        scorers.segment_reward,
        models=("model", "reference"),
        required=("model",),
        heads={"model": ("last_token", "prefixes", "segments")},
    ),
    "reading": made(scorers.reading, models=("model",), required=("model",), heads={"model": ANY}),
    "token_classifier": plain(
        credit.token_class_rewards, models=("model",), required=("model",), heads={"model": ("token_classes",)}
    ),
    "minimal_edits": plain(credit.edit_rewards),
    "span_severity": plain(credit.span_rewards, columns=SPANS),
    "span_severity_worst": plain(credit.worst_span_rewards, columns=SPANS),
    "span_severity_mildest": plain(credit.mildest_span_rewards, columns=SPANS),
    "span_severity_divided": plain(credit.divided_span_rewards, columns=SPANS),
    "matchtir": made(tool_turns.matchtir, columns=CALLS),
    "matchtir_advantages": made(tool_turns.matchtir_advantages, columns=CALLS),
    "matchtir_released_advantages": made(tool_turns.matchtir_released_advantages, columns=CALLS),
}

NOT_SOURCES: dict[str, str] = {
    "kl_in_reward": "the penalty of a policy that samples; for stored responses rto with dpo_coef=0",
    "shaping_terms": "the part of potential_shaping that is added to rewards; alone it knows no reward",
    "subtract_kl": "takes a penalty from rewards that another source gives, while a policy samples",
    "centred_advantages": "bends advantages of grouped rollouts, which pairs of stored responses are not",
    "reward_to_go": "gae without values and with lam=1",
    "total_return": "the same number on all tokens of a row",
    "spread_by_weights": "what abc and its kin share: a reward and weights already found",
    "scaled_by_return": "divides by the greatest return of a batch, so values would depend on how data are split",
    "signs_outside": "rounds the rewards of token_classifier",
    "with_last_token": "sets one weight of contrastive_scores",
    "critical_weights": "turns scores into weights, within contrastive_scores",
    "search_scores": "scores of prefixes in a beam search, not of tokens",
    "soft_values": "values that bellman takes differences of",
    "turn_advantages": "one of the two parts of matchtir_advantages",
}
"""Functions of `tokenpo.credit` with a value a token that are no source by themselves, and why."""

USUAL = {
    "tgdpo": "implicit",
    "t_reg": "contrastive_prompt",
    "bmc": "modified_tokens",
    "critical_dpo": "contrastive_scores",
    "sparsepo": "mask_network",
    "ra_dpo": "cvar",
}
"""Beginning of a loss's name -> the source it was published with, of SOURCES or of LIVE."""

Convert = Callable[[Tensor, Tensor, Tensor], Tensor]
CONVERSIONS: dict[tuple[str, str], dict[str, Convert]] = {
    ("token_rewards", "token_weights"): {
        "softmax": credit.softmax_weights,
        "min_max": credit.min_max_weights,
        "absolute": credit.absolute_weights,
    },
    ("token_weights", "token_rewards"): {"signed": credit.signed_rewards, "unsigned": credit.unsigned_rewards},
}
"""(what a source gives, what a loss reads) -> how one becomes the other (`credit.convert`), the first being usual."""


@functools.cache
def settings_of(name: str) -> dict[str, Any]:
    """The settings of a source and their defaults."""
    return {n: p.default for n, p in keyword_only(SOURCES[name].settings).items()}
