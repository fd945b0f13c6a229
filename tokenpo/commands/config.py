"""The configuration of a training run: one typed record for Python, YAML and the command line."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from tokenpo.commands.loading import load_model, trains_adapter


@dataclass
class TrainConfig:
    """Fine-tune a causal language model on preference pairs with a token-level loss."""

    task: Literal["offline"] = "offline"
    """offline: preference pairs. With `task: online` the settings are those of `tokenpo rl`."""
    model: str = "embedded"
    """Folder of a Hugging Face causal language model (safetensors), a hub name, or 'embedded': the tiny one inside."""
    train: str = "embedded"
    """Preference pairs to train on: a JSONL, Parquet or CSV file, a dataset folder, or 'embedded'."""
    test: str | None = None
    """Held-out pairs, likewise. Left out: a twentieth of the training pairs (at most 500), drawn with the seed."""
    columns: dict[str, str] = field(default_factory=dict)
    """Where your columns have other names: {prompt: question, chosen: good, rejected: bad}."""
    swap: bool = False
    """Train on the rejected responses as if they were chosen: the model of bad answers that some methods use."""
    max_length: int = 1024
    """Tokens of prompt and response together; a longer response is cut at its end, and counted."""
    max_prompt_length: int | None = None
    """Tokens of the prompt; a longer one loses its beginning."""
    loss: dict[str, Any] = field(default_factory=lambda: {"name": "tdpo2"})
    """The loss by name, and its hyperparameters: --loss.name dpo --loss.beta 0.2. `tokenpo methods` lists them."""
    reference: str = "auto"
    """auto, none, copy, adapter-off, adapter:NAME, model:FOLDER or cache. auto: adapter-off under LoRA, else a copy."""
    cache: dict[str, Any] = field(default_factory=dict)
    """For reference=cache: {folder: FOLDER, keep: logps|hidden|topk, k: 64, of: auto, verify: 32}; none is needed."""
    credit: dict[str, Any] = field(default_factory=dict)
    """Token rewards for a loss that needs them: {name: implicit, model: FOLDER, beta: 0.1}; no model: trained first."""
    teachers: dict[str, Any] = field(default_factory=dict)
    """Models for aligndistil to distil: {dpo: FOLDER, reverse: FOLDER}; one left out is trained first."""
    control_tokens: int = 8
    """For meet: how many tokens each of its controls, good and bad, puts before the prompt."""
    lora: int | None = None
    """Rank of a LoRA adapter on all linear layers; left out: all weights are trained."""
    lora_options: dict[str, Any] = field(default_factory=dict)
    """More arguments of peft.LoraConfig: {lora_alpha: 32, target_modules: [q_proj, v_proj]}."""
    quantize: Literal["nf4", "fp4"] | None = None
    """QLoRA: the weights under the adapter in four bits, with double quantisation; products are computed in dtype."""
    dtype: str = "auto"
    """Weights in float32, bfloat16 or float16; auto: as stored, but float32 where all weights are trained."""
    learning_rate: float | None = None
    """Left out: 5e-7 for all weights, 1e-4 for LoRA."""
    batch_size: int = 8
    """Pairs per device and micro-batch."""
    tokens_per_batch: int | None = None
    """Micro-batches of like length with at most this many tokens, padding included, and at most batch_size pairs."""
    share_prompts: bool | Literal["auto"] = "auto"
    """Compute a prompt once for all its responses, with equal results: where the model can, true or false."""
    accumulate: int = 1
    """Micro-batches per optimizer step; the loss is exact over all of them."""
    epochs: float = 1.0
    """Passes over the training pairs."""
    max_steps: int = -1
    """Optimizer steps, if positive, in place of epochs."""
    log_every: int = 10
    """Steps between logged lines."""
    eval_every: int | None = None
    """Steps between evaluations on the held-out pairs; left out: about ten in a run."""
    save_every: int | None = None
    """Steps between checkpoints; left out: as eval_every."""
    seed: int = 0
    """Order of the data, sampling, initial adapter."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Any other field of transformers.TrainingArguments: {report_to: wandb, bf16: true, warmup_steps: 20}."""
    samples: int = 64
    """Texts sampled before and after training, to compare; 0 samples none."""
    max_new_tokens: int = 128
    """Length limit of a sampled text."""
    output: str | None = None
    """Folder of the run; left out: runs/<loss>. A finished one is never written over, a killed one is gone on with."""
    resume: bool = True
    """Go on with an unfinished run of the same configuration in the output folder."""


def weights_dtype(config: TrainConfig) -> str:
    """That of the policy, so of its reference and teachers too: float32 where all weights train and none is set."""
    return "float32" if config.dtype == "auto" and not trains_adapter(config) else config.dtype


def loader(config: TrainConfig) -> Callable[[str], Any]:
    """How a run loads a causal model by its name: as the policy, in four bits too where it is the policy's own."""
    load = functools.partial(load_model, dtype=weights_dtype(config))
    return lambda name: load(name, quantize=config.quantize if name == config.model else None)


def preset(loss: str) -> dict[str, Any]:
    """Values that suit the embedded model and pairs, by loss: tiny models want large steps and a large beta.

    With preferences drawn by sigmoid(reward / tau), DPO's optimum tilts the reference by exp(reward / (tau * beta)):
    beta sets how far the policy moves.
    """
    return {
        "loss": {"name": loss, **EMBEDDED_LOSS.get(loss, {})},
        "learning_rate": 1e-3,
        "batch_size": 32,
        "max_steps": 256,
        "max_length": 96,
        "max_new_tokens": 64,
        "samples": 256,
        "trainer": {"lr_scheduler_type": "linear", "warmup_steps": 20},
        **EMBEDDED_SETTINGS.get(loss, {}),
    }


EMBEDDED_LOSS: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 1.5},
    "tdpo1": {"beta": 0.4},
    "tdpo2": {"beta": 0.25, "alpha": 0.3},
    "tgdpo": {"beta": 1.5, "alpha": 0.1},
    "t_reg": {"beta": 1.5},
    "bmc": {"beta": 1.0},
    "critical_dpo": {"gamma": 1.5},
    "ipo": {"beta": 5.0},
    "simpo": {"beta": 10.0, "gamma": 1.0},
    "sparsepo": {"beta": 1.0},
    "sparsepo_common": {"beta": 1.0},
    "ra_dpo1": {"beta": 0.4},
    "ra_dpo2": {"beta": 0.4},
    "orpo": {"beta": 8.0},
    "kto": {"beta": 1.5},
    "apo_zero_unpaired": {"beta": 1.5},
    "mapl_intra": {"beta": 0.5},
    "aligndistil": {"beta": 1.5, "r": 2.0, "floor": 0.1},
    "aligndistil_constant": {"beta": 1.5, "kl_coef": 1.5},
    "aligndistil_theorem1": {"beta": 1.5, "kl_coef": 0.75},
}
SPARSE: dict[str, Any] = {"learning_rate": 2e-4}
UNPAIRED: dict[str, Any] = {"learning_rate": 3e-4}
EMBEDDED_SETTINGS: dict[str, dict[str, Any]] = {
    "mapl_intra": {"max_length": 192, "learning_rate": 1e-4},
    "meet": {"learning_rate": 3e-3, "max_steps": 512},
    "sparsepo": SPARSE,
    "sparsepo_common": SPARSE,
    "kto": UNPAIRED,
    "apo_zero_unpaired": UNPAIRED,
}
"""Where a loss wants other settings: MAPL's prompts are long, and at 1e-3 its text falls apart; MEET has new embeddings
to learn and half of its tokens a side; without pairs no drift cancels, so steps are smaller."""
