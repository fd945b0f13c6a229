"""Credit sources of the command line that follow the models at every step, in the place of columns made before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenpo import methods
from tokenpo.commands.config import TrainConfig
from tokenpo.commands.loading import model_folder
from tokenpo.errors import InputError
from tokenpo.losses.ra_dpo import Confidence
from tokenpo.methods import Positive


@dataclass(frozen=True)
class Live:
    """A source: the fields it can give, what makes it, and whether it learns, which the loss has to be meant for.

    `make(fields, config, **settings)` returns a `tokenpo.training.TokenCredit`; `config` is the reference model's.
    """

    gives: tuple[str, ...]
    make: Callable[..., Any]
    learns: bool = False


def mask_network(
    fields: Sequence[str], config: Any, *, kind: Literal["all_layers", "last_layer"] = "all_layers"
) -> Any:
    """A network a field on the reference's hidden states, trained with the policy."""
    from tokenpo.training.mask_networks import MaskNetworks

    return MaskNetworks(fields, config, kind=kind)


def mapo(fields: Sequence[str], config: Any) -> Any:
    """Activations of the reference, rescaled along each response."""
    from tokenpo.training.activations import ActivationWeights

    return ActivationWeights(fields, "mapo")


def mapo_sigmoid(fields: Sequence[str], config: Any) -> Any:
    """Activations of the reference through a sigmoid."""
    from tokenpo.training.activations import ActivationWeights

    return ActivationWeights(fields, "mapo_sigmoid")


def cvar(fields: Sequence[str], config: Any, *, mu: Confidence = 0.95) -> Any:
    """Conditional value at risk."""
    return _risk("cvar_risk", mu=mu)


def entropic(fields: Sequence[str], config: Any, *, mu: Positive = 5.0) -> Any:
    """Entropic risk."""
    return _risk("entropic_risk", mu=mu)


def released(fields: Sequence[str], config: Any, *, level: Confidence = 0.95) -> Any:
    """The estimator of the authors' code, over the whole vocabulary."""
    return _risk("released_risk", level=level)


def released_split(fields: Sequence[str], config: Any, *, level: Confidence = 0.95) -> Any:
    """The estimator of the authors' code at its default, each half of the vocabulary for itself."""
    return _risk("released_split_risk", level=level)


MASKS = ("token_weights", "kl_weights")
LIVE: dict[str, Live] = {
    "mask_network": Live(MASKS, mask_network, learns=True),
    "mapo": Live(MASKS, mapo),
    "mapo_sigmoid": Live(MASKS, mapo_sigmoid),
    "cvar": Live(("ref_risk",), cvar),
    "entropic": Live(("ref_risk",), entropic),
    "released": Live(("ref_risk",), released),
    "released_split": Live(("ref_risk",), released_split),
}


def check_live(name: str, config: TrainConfig, loss: methods.Method) -> None:
    """Refuse a source that gives nothing the loss reads, or a setting it does not know."""
    source = LIVE[name]
    fields = fields_for(source, loss)
    if not fields:
        raise InputError(f"credit '{name}' gives {' and '.join(source.gives)}, which loss '{loss.name}' does not read")
    if source.learns and not set(fields) <= set(loss.learns):
        raise InputError(f"credit '{name}' learns {fields[0]}, which loss '{loss.name}' does not train: take sparsepo")
    methods.bind(f"credit '{name}'", source.make, settings(config))


def make_live(name: str, config: TrainConfig, loss: methods.Method, model: Any) -> Any:
    """The TokenCredit called `name` for the policy `model`."""
    read = model.config
    if config.reference.startswith("model:"):
        read = _config_of(config.reference.removeprefix("model:"))
    return LIVE[name].make(fields_for(LIVE[name], loss), read, **settings(config))


def fields_for(source: Live, loss: methods.Method) -> tuple[str, ...]:
    return tuple(field for field in source.gives if field in loss.needs)


def settings(config: TrainConfig) -> dict[str, Any]:
    return {key: value for key, value in config.credit.items() if key != "name"}


def _risk(measure: str, **level: float) -> Any:
    import functools

    from tokenpo import losses
    from tokenpo.training.risk import VocabularyRisk

    return VocabularyRisk(functools.partial(getattr(losses, measure), **level))


def _config_of(name: str) -> Any:
    """The configuration of a model on disk, through an adapter to its base."""
    from transformers import AutoConfig

    folder = model_folder(name)
    if (Path(folder) / "adapter_config.json").is_file():
        from peft import PeftConfig

        return _config_of(str(PeftConfig.from_pretrained(folder).base_model_name_or_path))
    return AutoConfig.from_pretrained(folder, trust_remote_code=False)
