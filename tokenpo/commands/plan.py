"""`tokenpo plan`: peak memory by part and time per step of a configuration, before anything is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenpo.commands.config import TrainConfig
from tokenpo.commands.plan_cards import Card, card_of
from tokenpo.commands.rl_config import RLConfig
from tokenpo.errors import InputError

Parse = Callable[..., Any]
GB = 2**30
MOST = 256
"""The largest micro-batch that is tried."""


@dataclass
class PlanConfig:
    """Predict peak memory by part and the time of a step from a model's configuration alone; no weights are read.

    `tokenpo plan [rl] [CONFIG.yaml] --gpu 24GB [key=value ...]`: everything else is as for `tokenpo train`, or, with
    `task: online` in the file or `rl` as the first word, as for `tokenpo rl`. Every row is taken to be as long as it
    may be.
    """

    gpu: str | None = None
    """A size such as 24GB (of 2^30 bytes), or a card: rtx 4090, l4, l40s, a100-40, a100-80, h100, ..."""
    tflops: float | None = None
    """10^12 operations a second; left out: the card's dense bfloat16 rate, or for a size alone a typical card's."""
    utilisation: float = 0.4
    """Share of that rate which training reaches; 0.3 to 0.5 is usual for bfloat16, less for small batches and QLoRA."""
    prompt_tokens: int | None = None
    """Tokens of a prompt; left out: max_prompt_length, or else half of max_length (rl: 512)."""
    response_tokens: int | None = None
    """Tokens of a response; left out: what the prompt leaves of max_length (rl: max_new_tokens)."""
    devices: int = 1
    """Cards that share weights, gradients and optimizer (FSDP2, ZeRO-3); the plan is for one of them. Weights in four
    bits are not shared out."""
    picture: str = "plan.png"
    """Where the stacked bars are drawn; an empty one draws nothing."""
    json: bool = False
    """Print one JSON object in the place of a table."""


OWN = tuple(PlanConfig.__dataclass_fields__)


def run(words: Sequence[str], parse: Parse, offline: Parse, online: Parse) -> dict[str, Any]:
    """The whole command. `parse(cls, command, words)` reads the planner's settings, the others a run's from words."""
    own, rest = _split(words)
    if {"-h", "--help"} & set(rest):
        own.append("--help")
    settings = parse(PlanConfig, "plan", own)
    _check(settings)
    card = None if settings.gpu is None else card_of(settings.gpu)
    reads = online if rest[:1] == ["rl"] else offline
    config = reads(rest[1:] if rest[:1] in (["rl"], ["train"]) else rest)
    found = plan(config, settings, card)
    show(found, settings, card)
    return found


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The planner's own words as --name=value, and the rest."""
    own: list[str] = []
    rest: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if name not in OWN or not (equals or word.startswith("--")):
            rest.append(word)
        elif equals:
            own.append(f"--{name}={value}")
        elif name == "json":
            own.append("--json=true")
        elif left and not re.match(r"--|[A-Za-z_][\w.]*=", left[0]):
            own.append(f"--{name}={left.pop(0)}")
        else:
            raise InputError(f"--{name} needs a value: --{name}={'24GB' if name == 'gpu' else '...'}")
    return own, rest


def _check(settings: PlanConfig) -> None:
    for name in ("tflops", "prompt_tokens", "response_tokens", "devices"):
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise InputError(f"{name} must be positive, got {value}")
    if not 0 < settings.utilisation <= 1:
        raise InputError(f"utilisation is a share in (0, 1], got {settings.utilisation}")


def plan(config: TrainConfig | RLConfig, settings: PlanConfig, card: tuple[str, Card] | None) -> dict[str, Any]:
    """Peaks by micro-batch, the largest that fits, seconds of a step."""
    from tokenpo.commands.plan_run import Asked, planned  # imports transformers

    memory = None if card is None else int(card[1].gigabytes * GB)
    given = planned(config, Asked(settings.prompt_tokens, settings.response_tokens, memory, settings.devices))
    peaks: dict[int, Any] = {}

    def peak(size: int) -> Any:
        if size not in peaks:
            peaks[size] = given.peak(size)
        return peaks[size]

    peak(given.batch)
    found: dict[str, Any] = {"peaks": peaks, "batch": given.batch, "what": given.what, "lengths": given.lengths}
    if card is not None and memory is not None:
        found["size"] = memory
        found["largest"] = largest(lambda n: peak(n).total, memory, given.step)
        found["capped"] = found["largest"] + given.step > MOST
        rate = (settings.tflops or card[1].tflops) * 1e12 * settings.utilisation
        found["seconds"] = given.flops / rate + given.moved / (card[1].bandwidth * 1e9 * settings.utilisation)
    elif settings.tflops is not None:
        found["seconds"] = given.flops / (settings.tflops * 1e12 * settings.utilisation)
    found["flops"] = given.flops
    return found


def largest(total: Callable[[int], int], limit: int, step: int = 1) -> int:
    """The largest multiple of `step` up to MOST whose `total` is at most `limit`; 0 if none is.

    `total` rises, almost in a straight line, so few are computed: the next is where the line meets the limit.
    """
    if total(step) > limit:
        return 0
    low, high, slope = 1, MOST // step + 1, 0.0
    while high - low > 1:
        room = limit - total(low * step)
        guess = low + int(room / slope) if slope > 0 else 2 * low
        guess = min(max(guess, low + 1), high - 1, 8 * low)
        slope = max(1.0, (total(guess * step) - total(low * step)) / (guess - low))
        low, high = (guess, high) if total(guess * step) <= limit else (low, guess)
    return low * step


def show(found: dict[str, Any], settings: PlanConfig, card: tuple[str, Card] | None) -> None:
    """Print and draw."""
    from tokenpo.commands.plan_report import draw, duration, table, verdict

    peaks, batch = found["peaks"], found["batch"]
    if settings.json:
        kept = {k: v for k, v in found.items() if k != "peaks"}
        kept["parts"], kept["where"] = dict(peaks[batch].parts), peaks[batch].where
        print(json.dumps({**kept, "peak": peaks[batch].total, "gpu": None if card is None else card[0]}))
    else:
        print(f"micro-batches of {batch} {found['what']}s, {found['lengths']}\n\n{table(peaks[batch])}\n")
        if card is not None:
            said = verdict(found["size"], peaks, batch, found["largest"], found["what"], capped=found["capped"])
            print(f"{card[0]}: {said}")
        if "seconds" in found:
            rate = settings.tflops or (card[1].tflops if card else 0)
            print(
                f"A step takes about {duration(found['seconds'])}: {found['flops'] / 1e12:.3g} TFLOP at "
                f"{settings.utilisation:.0%} of {rate:g} TFLOPS."
            )
    if settings.picture:
        shown = {n: p for n, p in peaks.items() if n in _shown(peaks, batch, found.get("largest"))}
        file = draw(Path(settings.picture), shown, batch, found.get("size"), f"{found['what']}s a micro-batch")
        if not settings.json:
            print(f"written: {file}")


def _shown(peaks: dict[int, Any], batch: int, most: int | None) -> set[int]:
    """At most eight bars: the one asked for, the largest that fits and the first that does not, and smaller ones."""
    over = [n for n in peaks if most is not None and n > most]
    kept = {batch, *([most] if most else []), *([min(over)] if over else [])}
    for n in sorted(peaks):
        if len(kept) < 8 and (most is None or n <= most or n <= batch):
            kept.add(n)
    return kept
