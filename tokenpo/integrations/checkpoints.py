"""What a checkpoint of an online run holds beside TRL's: whatever remembers, and rollouts that are not used up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tokenpo.advantages.compose import Composition
from tokenpo.errors import InputError
from tokenpo.integrations.critic import Critic
from tokenpo.integrations.rewards import forget_from
from tokenpo.integrations.sampling import Sampling

STATE, SAMPLING = "advantages.json", "sampling.json"


class CheckpointMixin:
    """For a GRPOTrainer that holds the settings below."""

    composition: Composition
    sampling: Sampling
    critic: Critic | None
    run_folder: Path
    num_iterations: int
    accelerator: Any
    args: Any
    _step: int
    _buffered_inputs: Any

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)  # type: ignore[misc]
        folder = Path(output_dir)
        unused = self._step % (self.args.steps_per_generation * self.num_iterations)
        kept = {"step": self._step, "rollouts": self._buffered_inputs if unused else None}
        torch.save(kept, folder / f"rollouts-{self.accelerator.process_index}.pt")
        if self.args.should_save:
            (folder / STATE).write_text(json.dumps(self.composition.state_dict()))
            if self.sampling.temperature is not None:
                (folder / SAMPLING).write_text(json.dumps(self.sampling.temperature.state_dict()))
            if self.critic is not None:
                self.critic.save(folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is None:
            return
        folder, file = Path(checkpoint), f"rollouts-{self.accelerator.process_index}.pt"
        if not (folder / STATE).is_file() or not (folder / file).is_file():
            raise InputError(
                f"{folder} has no {STATE} or no {file}: it was written by another trainer, or by fewer processes"
            )
        self.composition.load_state_dict(json.loads((folder / STATE).read_text()))
        if self.sampling.temperature is not None:
            if not (folder / SAMPLING).is_file():
                raise InputError(f"{folder} has no {SAMPLING}: it was written by a run without hapo_temperature")
            self.sampling.temperature.load_state_dict(json.loads((folder / SAMPLING).read_text()))
        kept = torch.load(folder / file, map_location=self.args.device, weights_only=True)
        self._step, self._buffered_inputs = kept["step"], kept["rollouts"]
        if self.accelerator.is_main_process:
            done = json.loads((folder / "trainer_state.json").read_text())["global_step"]
            for name in ("rollouts.jsonl", "continuations.jsonl"):
                forget_from(self.run_folder / name, done)
        if self.critic is not None:
            self.critic.load(folder)
