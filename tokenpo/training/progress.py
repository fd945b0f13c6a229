"""One line of progress with the time left, and one line for each evaluation."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

SHOWN = {
    "loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin", "reward": "reward",
    "entropy": "entropy", "kl/reference": "kl",
}  # fmt: skip


class ProgressLine(TrainerCallback):
    """A bar over optimizer steps: done, time left, and the last loss, accuracy and margin; evaluations above it."""

    def __init__(self) -> None:
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            shape = "{desc}: {n_fmt}/{total_fmt} steps |{bar}| {remaining} left, {rate_fmt}{postfix}"
            every = 0.2 if sys.stderr.isatty() else 10.0
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc="training",
                bar_format=shape,
                mininterval=every,
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.bar is not None and logs and "loss" in logs:
            self.bar.set_postfix_str(_short(logs, ""), refresh=False)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, Any] | None = None, **kw: Any
    ) -> None:
        if self.bar is not None and metrics:
            self.bar.write(f"step {state.global_step}: held out {_short(metrics, 'eval_')}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class StepClock(TrainerCallback):
    """Seconds spent in optimizer steps, evaluation and saving left out."""

    def __init__(self) -> None:
        self.seconds, self.steps, self._start = 0.0, 0, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += time.perf_counter() - self._start
        self.steps += 1


def _short(values: dict[str, Any], prefix: str) -> str:
    return ", ".join(f"{label} {values[prefix + key]:.3g}" for key, label in SHOWN.items() if prefix + key in values)
