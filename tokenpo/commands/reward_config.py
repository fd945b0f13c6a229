"""The configurations of `tokenpo reward train | score | eval`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class RewardConfig:
    """Train a model that scores tokens: a head on a causal language model, or a causal model against itself."""

    model: str = "embedded"
    """Folder of a Hugging Face causal language model (safetensors), a hub name, or 'embedded': the tiny one inside."""
    train: str = "embedded"
    """Pairs (chosen, rejected), or single responses with an outcome, spans or judged steps; or 'embedded': pairs."""
    test: str | None = None
    """Held-out rows, likewise. Left out: a twentieth of the training rows (at most 500), drawn with the seed."""
    columns: dict[str, str] = field(default_factory=dict)
    """Where the columns of pairs have other names: {prompt: question, chosen: good, rejected: bad}."""
    reading: dict[str, Any] = field(default_factory=lambda: {"name": "segments"})
    """last_token, prefixes, segments, token_classes, values or implicit, and its settings: --reading.threshold 1.75."""
    edits: str = "word"
    """For token_classes on pairs: what counts as changed from rejected to chosen, compared by word or by token."""
    max_length: int = 1024
    """Tokens of prompt and response together; a longer response is cut at its end, and counted."""
    max_prompt_length: int | None = None
    """Tokens of the prompt; a longer one loses its beginning."""
    lora: int | None = None
    """Rank of a LoRA adapter on all linear layers, merged into the model at the end; left out: all weights train."""
    lora_options: dict[str, Any] = field(default_factory=dict)
    """More arguments of peft.LoraConfig: {lora_alpha: 32, target_modules: [q_proj, v_proj]}."""
    dtype: str = "auto"
    """Weights in float32, bfloat16, float16, or auto: float32 where all weights train, else as stored."""
    learning_rate: float | None = None
    """Peak learning rate. Left out: 1e-5, or 1e-4 with LoRA."""
    batch_size: int = 8
    """Pairs, or single responses, per device and micro-batch."""
    accumulate: int = 1
    """Micro-batches per optimizer step; the loss is exact over all of them."""
    epochs: float = 1.0
    """Passes over the training rows."""
    max_steps: int = -1
    """Optimizer steps, if positive, in place of epochs."""
    log_every: int = 10
    """Steps between logged lines."""
    eval_every: int | None = None
    """Steps between evaluations on the held-out rows; left out: about ten in a run."""
    save_every: int | None = None
    """Steps between checkpoints; left out: as eval_every."""
    seed: int = 0
    """Order of the data, the fresh head, the initial adapter."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Any other field of transformers.TrainingArguments: {report_to: wandb, bf16: true, warmup_steps: 20}."""
    output: str | None = None
    """Folder of the run; left out: runs/reward-<reading>. A finished one is never written over."""
    resume: bool = True
    """Go on with an unfinished run of the same configuration in the output folder."""


EMBEDDED: dict[str, Any] = {
    "learning_rate": 1e-3,
    "batch_size": 32,
    "max_steps": 256,
    "max_length": 96,
    "trainer": {"lr_scheduler_type": "linear", "warmup_steps": 20},
}
"""What suits the embedded model and pairs: tiny models want large steps."""

EMBEDDED_READING: dict[str, dict[str, Any]] = {"implicit": {"beta": 1.0}}


@dataclass
class RewardScoreConfig:
    """Score responses: a number each, and a value for every token where the scorer has them."""

    model: str
    """A reward model's folder, a sequence classifier's, module:function, math-verify, reasoning-gym, xcomet:FILE."""
    data: str
    """Pairs or single responses: a JSONL, Parquet or CSV file, a dataset folder, or 'embedded' (its held-out pairs)."""
    output: str
    """JSONL file to write."""
    max_length: int = 1024
    """Tokens of prompt and response together."""
    batch_size: int = 32
    """Responses a forward pass."""


@dataclass
class RewardEvalConfig:
    """Measure a scorer on held-out rows: pairs ranked, outcomes foreseen, labelled tokens found, with intervals."""

    model: str
    """A reward model's folder, a sequence classifier's, module:function, math-verify, reasoning-gym, xcomet:FILE."""
    data: str = "embedded"
    """Pairs or labelled responses; 'embedded': its held-out pairs, whose words have a known worth."""
    max_length: int = 1024
    """Tokens of prompt and response together."""
    batch_size: int = 32
    """Responses a forward pass."""
    rows: int | None = None
    """Measure on the first rows only."""
    output: str | None = None
    """JSON file for the figures; left out: the terminal only."""
