"""One line of progress with the time left, and one line for each evaluation."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

SHOWN = {
    "loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin", "reward": "reward",
    "entropy": "entropy", "kl/reference": "kl", "tokens_per_second": "tokens/s",
}  # fmt: skip
CLIPS = ("clip/low", "clip/high", "clip/dual")
"""Shares of tokens that a clip holds; no token is in two of them."""


class ProgressLine(TrainerCallback):
    """A bar over optimizer steps: done, time left, and the last loss, accuracy and margin; evaluations above it.

    Where tokens are counted (`num_tokens`, prompts and responses of all processes), the rate since the last count is
    added to the logged row as `tokens_per_second`, evaluation and saving left out.
    """

    def __init__(self) -> None:
        self.bar: Any = None
        self.clock, self.counted, self.at = StepClock(), 0.0, 0.0
        self.rate: dict[str, float] = {}

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
            self.clock, self.counted, self.at = StepClock(), float(state.num_input_tokens_seen), 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.on_step_begin(args, state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.on_step_end(args, state, control)
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.bar is not None and logs and "loss" in logs:
            if "num_tokens" in logs and self.clock.seconds > self.at:
                rate = (logs["num_tokens"] - self.counted) / (self.clock.seconds - self.at)
                self.counted, self.at = logs["num_tokens"], self.clock.seconds
                self.rate = {"tokens_per_second": rate}
                for row in (logs, state.log_history[-1]):  # what callbacks get is a copy of what is kept
                    row.update(self.rate)
            self.bar.set_postfix_str(_short({**self.rate, **logs}, ""), refresh=False)

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
    found = {label: values.get(prefix + key) for key, label in SHOWN.items()}
    clips = [values[prefix + key] for key in CLIPS if isinstance(values.get(prefix + key), (int, float))]
    if clips:
        found["clipped"] = sum(clips)
    numbers = {label: value for label, value in found.items() if isinstance(value, (int, float))}
    return ", ".join(f"{label} {value:{'.0f' if abs(value) >= 1000 else '.3g'}}" for label, value in numbers.items())
