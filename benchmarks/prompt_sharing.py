"""Prompts computed once: a GRPO update (forward and backward of response log-probs) with and without sharing.

python benchmarks/prompt_sharing.py [--dtype float32] [--rounds 5] [--prompt 2048 --group 8 --response 128]

A 44M Qwen3-shaped model (V = 50,000, head trained) on one prompt and its group of responses. Log-probs and gradients of
the competitors are compared first, then they run in turn: `unshared`, the ordinary forward of whole rows; `shared`, all
in one row with attention computed group by group; `dense_mask`, the same row with a mask of (L, L). The scans vary one
length at a time on two layers of the same width. The last line is one JSON object; `ratio` is shared / unshared.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import VOCABULARY, alternate, draw_scan, emit, machine, median_ratio, qwen3_44m
from torch import Tensor, nn

from tokenpo.statistics import PromptSharing, linear_token_stats, response_stats, shared
from tokenpo.statistics.head import LinearHead

Update = Callable[[], Tensor]


def make_group(prompt: int, group: int, response: int) -> dict[str, Tensor]:
    """One prompt and `group` responses of equal length: the padding of unequal ones would only favour sharing."""
    rng = torch.Generator().manual_seed(1)
    draw = functools.partial(torch.randint, 3, VOCABULARY, generator=rng)
    ids = torch.cat([draw((1, prompt)).expand(group, prompt), draw((group, response))], 1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "prompt_lengths": torch.full((group,), prompt),
        "response_lengths": torch.full((group,), response),
    }


def competitors(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Update]:
    """Each computes the response log-probs and the gradients of a weighted sum of them, from nothing."""
    weights = torch.randn(int(batch["response_lengths"].sum()), generator=torch.Generator().manual_seed(2))
    sharing = PromptSharing(True)
    sharing.shares(model, batch)  # the check of the first batch is no part of a step
    tokens = torch.cat([row[p:] for row, p in zip(batch["input_ids"], batch["prompt_lengths"], strict=True)])

    def dense_mask() -> Tensor:
        hidden = shared.packed_hidden(model, shared.pack(batch, flat=False))
        return linear_token_stats(hidden, LinearHead.of(model), tokens, outputs=("logps",))["logps"]

    def update(logps_of: Update) -> Tensor:
        model.zero_grad(set_to_none=True)
        logps = logps_of().flatten()
        (logps * weights).sum().backward()
        return logps.detach()

    ways = {
        "unshared": lambda: response_stats(model, batch).logps,
        "shared": lambda: response_stats(model, batch, sharing=sharing).logps,
        "dense_mask": dense_mask,
    }
    return {name: functools.partial(update, way) for name, way in ways.items()}


def compare(model: nn.Module, updates: dict[str, Update]) -> dict[str, dict[str, float]]:
    """Largest difference of a log-prob from `unshared`, and of a gradient relative to its size."""
    found = {}
    wanted, gradients = updates["unshared"](), _gradients(model)
    for name in updates:
        if name == "unshared":
            continue
        logps = updates[name]()
        errors = [((g - gradients[n]).norm() / gradients[n].norm()).item() for n, g in _gradients(model).items()]
        found[name] = {"log_prob": (logps - wanted).abs().max().item(), "gradient": max(errors)}
    return found


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def scan(lengths: list[tuple[int, int, int]], dtype: torch.dtype, rounds: int) -> list[dict[str, float]]:
    """Median seconds and ratio for each (prompt, group, response), on two layers."""
    model, found = qwen3_44m(dtype, layers=2), []
    for prompt, group, response in lengths:
        updates = competitors(model, make_group(prompt, group, response))
        taken = alternate({n: updates[n] for n in ("unshared", "shared")}, rounds)
        medians = {name: statistics.median(values) for name, values in taken.items()}
        ratio = median_ratio(taken["shared"], taken["unshared"])
        found.append({"prompt": prompt, "group": group, "response": response, **medians, "ratio": ratio})
        print(" ".join(f"{k} {v:.4g}" for k, v in found[-1].items()), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32")
    for name, default in (("rounds", 5), ("prompt", 2048), ("group", 8), ("response", 128), ("layers", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--scan-rounds", type=int, default=3, help="0 leaves the scans out")
    parser.add_argument("--out", default="runs/benchmarks")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    model = qwen3_44m(dtype, args.layers)
    updates = competitors(model, make_group(args.prompt, args.group, args.response))
    errors = compare(model, updates)
    print("differences from unshared:", errors, flush=True)
    if dtype == torch.float32 and any(e["log_prob"] > 1e-5 or e["gradient"] > 1e-4 for e in errors.values()):
        raise SystemExit("the results differ: nothing is timed")
    taken = alternate(updates, args.rounds, warm_up=False)  # they ran once to be compared
    result: dict[str, Any] = {
        "benchmark": "prompt_sharing",
        "settings": vars(args),
        "seconds": {name: statistics.median(values) for name, values in taken.items()},
        "ratio": median_ratio(taken["shared"], taken["unshared"]),
        "ratio_dense_mask": median_ratio(taken["dense_mask"], taken["unshared"]),
        "differences": errors,
        "machine": machine(),
    }
    if args.scan_rounds:
        prompts = [(p, 8, 128) for p in (128, 256, 512, 1024, 2048)]
        groups = [(1024, n, 128) for n in (1, 2, 4, 8)]
        result["scan_prompt"] = scan(prompts, dtype, args.scan_rounds)
        result["scan_group"] = scan(groups, dtype, args.scan_rounds)
        for name, axis in (("prompt", "prompt tokens, 8 responses of 128"), ("group", "responses of 128, prompt 1024")):
            rows = result[f"scan_{name}"]
            lines = {way: [row[way] for row in rows] for way in ("unshared", "shared")}
            picture = Path(args.out) / f"prompt_sharing_{name}.png"
            draw_scan(picture, [row[name] for row in rows], lines, (axis, "seconds an update, 2 layers"))
    emit(result)


if __name__ == "__main__":
    main()
