"""The reward model: a network, what its outputs mean, a tokenizer, and the frozen model that some readings need."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenpo.errors import InputError
from tokenpo.reward_models.network import head_class, head_logits
from tokenpo.reward_models.readings import Outputs, Reading
from tokenpo.statistics import LinearHead, hidden_before_head, response_stats

FIELD = "token_reward"
"""The entry of config.json that holds the reading."""
REFERENCE = "reference"
"""Folder beside the weights of the frozen language model that the readings `segments` and `implicit` need."""
LOADING = {"use_safetensors": True, "trust_remote_code": False}


class RewardModel(nn.Module):
    """Any Hugging Face causal model with a head on every token, or a causal model beside its reference.

    `network`: a model of `head_class`, or for the reading `implicit` a causal language model. `reference`: a frozen
    causal language model, for readings that read one. All methods run without gradient; a batch is laid out as in
    `tokenpo.statistics.response_stats`: T is its longest response.
    """

    def __init__(self, network: Any, reading: Reading, tokenizer: Any, reference: Any = None) -> None:
        super().__init__()
        if reading.reads_reference and reference is None:
            raise InputError(f"reading '{reading.name}' reads a frozen language model: give reference=")
        self.network, self.reference = network, reference
        self.reading, self.tokenizer = reading, tokenizer

    @classmethod
    def from_backbone(
        cls, folder: str, reading: Reading, tokenizer: Any, *, dtype: Any = torch.float32, seed: int = 0
    ) -> RewardModel:
        """A model to train: the language model of `folder` under a fresh head; what it starts from is its reference."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        reference = _causal(folder, dtype).requires_grad_(False) if reading.reads_reference else None
        if reading.outputs == 0:
            return cls(_causal(folder, dtype), reading, tokenizer, reference)
        config.num_labels = reading.outputs
        if reading.classes:
            config.id2label = dict(enumerate(reading.classes))
            config.label2id = {name: i for i, name in enumerate(reading.classes)}
        if config.get_text_config().pad_token_id is None:
            config.get_text_config().pad_token_id = tokenizer.eos_token_id
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network, found = _load(head_class(config), folder, dtype, config=config)
        _require_weights(folder, found, fresh=("score.weight", "score.bias"))
        return cls(network, reading, tokenizer, reference)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, dtype: Any = torch.float32) -> RewardModel:
        """A model written by `save_pretrained`, or any sequence classifier with one label, read at its last token.

        In eval mode. Safetensors only, and no code from the folder. Errors: InputError for a folder without a head.
        """
        from transformers import AutoConfig, AutoTokenizer

        folder = str(folder)
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError) as reason:
            raise InputError(f"cannot load a reward model from {folder}: {_first_line(reason)}") from reason
        settings = getattr(config, FIELD, None)
        reading = Reading() if settings is None else Reading.from_dict(settings)
        if reading.outputs and config.num_labels != reading.outputs:
            raise InputError(
                f"{folder} is no reward model: its head has {config.num_labels} outputs, and reading '{reading.name}' "
                f"takes {reading.outputs}"
            )
        reference = _causal(str(Path(folder) / REFERENCE), dtype) if reading.reads_reference else None
        if reading.outputs == 0:
            return cls(_causal(folder, dtype), reading, tokenizer, reference).eval()
        network, found = _load(head_class(config), folder, dtype)
        _require_weights(folder, found)
        return cls(network, reading, tokenizer, reference).eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Safetensors, config.json with the reading and its normaliser, tokenizer, and the reference if any."""
        setattr(self.network.config, FIELD, self.reading.as_dict())
        self.network.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        if self.reference is not None:
            self.reference.save_pretrained(Path(folder) / REFERENCE)

    def with_reading(self, **changes: Any) -> RewardModel:
        """The same networks under changed settings, such as the fitted normaliser; shares the weights."""
        reading = dataclasses.replace(self.reading, **changes)
        if reading.outputs != self.reading.outputs:
            raise InputError(f"a head trained for '{self.reading.name}' cannot be read as '{reading.name}'")
        return RewardModel(self.network, reading, self.tokenizer, self.reference)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def forward(self, batch: Mapping[str, Tensor]) -> Outputs:
        """One forward of the network, and of the reference where the reading needs it."""
        return reading_outputs(self.reading, self.network, batch, self.reference)

    @torch.no_grad()
    def token_values(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(B, T) what the reading says of every response token, zero past a response's end."""
        return self.reading.token_values(self(batch))

    @torch.no_grad()
    def prefix_values(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(B, T + 1) the value after the prompt and after every response token (`tokenpo.credit.red_rewards`)."""
        return self.reading.prefix_values(self(batch))

    @torch.no_grad()
    def scores(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(B,) one number a response."""
        return self.reading.scores(self(batch))

    @torch.no_grad()
    def token_rewards(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(B, T) what every response token earned: credit for an objective."""
        return self.reading.token_rewards(self(batch))


def reading_outputs(reading: Reading, network: nn.Module, batch: Mapping[str, Tensor], reference: Any) -> Outputs:
    """What `reading` needs to know of a batch, with gradient to `network` and none to `reference`."""
    lengths = batch["response_lengths"]
    mask = torch.arange(int(lengths.max()), device=lengths.device) < lengths.unsqueeze(-1)
    if reading.name == "implicit":
        of = lambda b: (hidden_before_head(reference, b), LinearHead.of(reference))
        stats = response_stats(network, batch, ("logps",), reference=of)
        return Outputs(mask, logps=stats.logps, ref_logps=stats.require("ref_logps"))
    entropy = None
    if reading.name == "segments":
        with torch.no_grad():
            entropy = response_stats(reference, batch, ("entropy",)).require("entropy")
    return Outputs(mask, logits=head_logits(network, batch), entropy=entropy)


def _causal(folder: str, dtype: Any) -> Any:
    from transformers import AutoModelForCausalLM

    model, found = _load(AutoModelForCausalLM, folder, dtype)
    _require_weights(folder, found)
    return model


def _load(cls: Any, folder: str, dtype: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # what is missing is looked at here
    try:
        return cls.from_pretrained(folder, dtype=dtype, output_loading_info=True, **LOADING, **options)
    except (OSError, ValueError, RuntimeError) as reason:
        if isinstance(reason, InputError):
            raise
        raise InputError(f"cannot load a model from {folder}: {_first_line(reason)}") from reason
    finally:
        logging.set_verbosity(before)


def _require_weights(folder: str, found: Mapping[str, Any], fresh: tuple[str, ...] = ()) -> None:
    missing = sorted(set(found["missing_keys"]) - set(fresh))
    if missing:
        raise InputError(f"{folder} lacks {len(missing)} weights, '{missing[0]}' first: it is no reward model")


def _first_line(reason: BaseException) -> str:
    return (str(reason).strip() or type(reason).__name__).split("\n")[0].rstrip(".")
