"""The configuration of an online run: one typed record for Python, YAML and the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class RLConfig:
    """Train a causal language model on its own samples with token advantages, on TRL (pip install tokenpo[trl])."""

    task: Literal["online"] = "online"
    """What makes `tokenpo train` read a configuration as one of `tokenpo rl`."""
    model: str = "embedded-digits"
    """Folder of a Hugging Face causal language model (safetensors), a hub name, or a tiny one inside the package:
    'embedded-digits', which copies digits with mistakes, or 'embedded', which writes reviews."""
    prompts: str = "embedded"
    """Rows with a 'prompt' (text or messages): JSONL, Parquet or CSV; other columns go to the reward function. Or
    'embedded-digits', 'embedded-reviews'; 'embedded': those of the embedded model."""
    reward: str = "embedded"
    """Embedded: of digits right_digits, 1 where all are right, else 0; of reviews true_reward. Or module:function in
    TRL's signature, a reward model's folder, math-verify (reads column 'answer'), or reasoning-gym (reads 'entry')."""
    advantages: list[Any] = field(default_factory=lambda: ["grpo"])
    """An estimator, then shapers and filters in order: [{name: ktae}, {name: a3po, fraction: 0.1}, whiten]."""
    objective: dict[str, Any] = field(default_factory=lambda: {"name": "ppo_clip"})
    """The loss and its numbers: {name: ppo_clip, clip_high: 0.28, kl_coef: 0.01, kl: k3+, aggregation: token_mean}."""
    credit: dict[str, Any] | None = None
    """Token rewards of a registered credit method that reads nothing but rollouts: {name: rto, dpo: FOLDER}."""
    critic: dict[str, Any] | None = None
    """For ppo_gae and vapo: {learning_rate: 1e-3, pretrain: 10}; an empty one takes the defaults."""
    sampling: list[Any] = field(default_factory=list)
    """More or other rollouts: [{name: spo_chain, rollouts: 4}], spo_tree, dynamic_sampling, hapo_temperature."""
    stages: dict[str, Any] | None = None
    """{name: lopti, eta: 0.4}: the two updates on a batch (updates=2) train improbable tokens, then the others."""
    answers: str | None = None
    """Final answers, which copo and copo_blend compare: text (all of it), math-verify (the last expression), or
    module:function in TRL's signature, which returns a string or None each."""
    correct_above: float | None = None
    """Rewards greater than this count as correct, for methods that ask."""
    reference: str = "auto"
    """What KL terms measure from: auto, none, copy, adapter-off or model:FOLDER; made only if something reads it."""
    group_size: int = 8
    """Responses to each prompt."""
    batch_size: int = 32
    """Responses per device and micro-batch."""
    accumulate: int = 1
    """Micro-batches per optimizer step; the loss is exact over all of them."""
    updates: int = 1
    """Optimizer steps on each batch of responses."""
    share_prompts: bool | Literal["auto"] = "auto"
    """Compute a prompt once for its whole group, with equal results: where the model can, true or false."""
    max_new_tokens: int = 64
    """Length limit of a response."""
    temperature: float = 1.0
    """Of sampling; log-probs are of the distribution at this temperature."""
    lora: int | None = None
    """Rank of a LoRA adapter on all linear layers; left out: all weights are trained."""
    lora_options: dict[str, Any] = field(default_factory=dict)
    """More arguments of peft.LoraConfig."""
    quantize: Literal["nf4", "fp4"] | None = None
    """QLoRA: the weights under the adapter in four bits, with double quantisation; products are computed in dtype."""
    dtype: str = "auto"
    """Weights in float32, bfloat16 or float16; auto: as stored, but float32 where all weights are trained."""
    learning_rate: float | None = None
    """Left out: 1e-6 for all weights, 1e-5 for LoRA."""
    max_steps: int = 100
    """Optimizer steps."""
    log_every: int = 5
    """Steps between logged lines."""
    save_every: int | None = None
    """Steps between checkpoints; left out: about ten in a run."""
    seed: int = 0
    """Order of the prompts, sampling, initial adapter."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Any other field of trl.GRPOConfig: {use_vllm: true, top_p: 0.95, warmup_steps: 10}."""
    samples: int = 128
    """Texts sampled before and after training, to compare; 0 samples none."""
    keep_rollouts: int = 8
    """Responses of every batch that are written to rollouts.jsonl, with the advantage of every token."""
    output: str | None = None
    """Folder of the run; left out: runs/rl-<estimator>. A finished one is never written over, a killed one goes on."""
    resume: bool = True
    """Go on with an unfinished run of the same configuration in the output folder."""


def preset(model: str, objective: str) -> dict[str, Any]:
    """Values that suit an embedded model; the one of reviews would soon write one praising word without a KL term."""
    from tokenpo import methods

    if model == "embedded-digits":
        return {"learning_rate": 3e-4, "batch_size": 128, "max_new_tokens": 20}
    known = methods.all_methods("policy_gradient")
    held = objective in known and "kl_coef" in known[objective].hyperparameters
    kl = {"kl_coef": 0.1, "kl": "exact"} if held else {}
    return {"learning_rate": 3e-4, "objective": {"name": objective, **kl}}
