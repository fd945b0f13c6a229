"""verl's synchronous trainer, for estimators that read tokens, log-probs, entropy, values, or remember.

Chosen by `trainer.v1.trainer_mode=tokenpo`. verl's own `_compute_advantage` runs as it is; around it, the columns that
its workers computed anyway are fetched and laid where the registered estimator finds them.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import transfer_queue as tq
from tensordict import TensorDict
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.workers.utils.padding import response_to_nested

from tokenpo.integrations.verl.check import run_composition, transferred_columns
from tokenpo.integrations.verl.fields import LIST, Step, during, transferred

STATE = "tokenpo.pt"


@register_trainer(LIST)
class TokenpoTrainer(PPOTrainerSync):
    """`PPOTrainerSync` with more inputs for estimators; with an estimator of verl's own it is the same."""

    def __init__(self, config: Any) -> None:
        self.composition = run_composition(config)
        super().__init__(config)

    def _build_replay_buffer(self) -> Any:
        # verl treats every mode but "sync" as asynchronous; the parent reads the mode before it calls this.
        self.trainer_mode = "sync"
        return super()._build_replay_buffer()

    def _compute_advantage(self, batch: Any, metrics: dict) -> Any:
        if self.composition is None:
            return super()._compute_advantage(batch, metrics)
        columns = [*transferred_columns(self.config), "response_mask"]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=columns)
        lengths = data["response_mask"]
        inputs = {**transferred(data.to_padded_tensor()), "step": self.global_steps}
        with during(Step(self.composition, inputs)) as step:
            batch = super()._compute_advantage(batch, metrics)
        if step.mask is None or not any(part.kind == "filter" for part in self.composition.parts):
            return batch
        mask = step.mask.to(lengths.dtype)
        metrics["tokenpo/kept_tokens"] = (mask.sum() / lengths.values().sum().clamp(min=1)).item()
        kept = TensorDict({"response_mask": response_to_nested(mask, lengths)}, batch_size=len(batch))
        return tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=kept)

    def _save_checkpoint(self) -> None:
        if self.composition is not None and self.composition.stateful():
            folder = os.path.join(self.config.trainer.default_local_dir, f"global_step_{self.global_steps}")
            os.makedirs(folder, exist_ok=True)
            torch.save(self.composition.state_dict(), os.path.join(folder, STATE))
        super()._save_checkpoint()

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if self.composition is None or not self.composition.stateful() or not self.global_steps:
            return
        trainer = self.config.trainer
        folder = os.path.join(trainer.default_local_dir, f"global_step_{self.global_steps}")
        folder = trainer.resume_from_path if trainer.resume_mode == "resume_path" else folder
        self.composition.load_state_dict(torch.load(os.path.join(folder, STATE), weights_only=True))
