"""A full preference step (forward of policy and reference, loss, backward, optimizer) against TRL's DPOTrainer.

python benchmarks/preference_step.py [--dtype float32 bfloat16] [--rounds 5] [--out runs/benchmarks]

All of them train the same 44M Qwen3-shaped model (V = 50,000) on the same four pairs (prompts of 256 to 512 tokens,
responses of 64 to 256) in one process, in turn. Losses and gradients are compared first. Peak memory is that of a
child process a competitor. `tdpo_dense` is TDPO2 as its authors write it: whole logits of policy and reference.
The last line is one JSON object; `ratios` are against TRL's DPO step.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import (
    HIDDEN,
    INNER,
    LAYERS,
    VOCABULARY,
    alternate,
    draw_bars,
    emit,
    extra_peak,
    in_child,
    machine,
    median_ratio,
    qwen3_44m,
    seconds,
)  # fmt: skip
from torch import Tensor, nn

PAIRS, PROMPT, RESPONSE = 4, (256, 512), (64, 256)
Step = Callable[[], tuple[float, dict[str, Tensor]]]
NAMES = ("trl_dpo", "dpo", "dpo_cached", "tdpo2", "tdpo2_cached", "tdpo_dense")


def make_rows(seed: int = 0) -> list[dict[str, list[int]]]:
    rng = torch.Generator().manual_seed(seed)

    def ids(bounds: tuple[int, int]) -> list[int]:
        length = int(torch.randint(bounds[0], bounds[1] + 1, (), generator=rng))
        return torch.randint(3, VOCABULARY, (length,), generator=rng).tolist()

    return [
        {"prompt_ids": ids(PROMPT), "chosen_ids": ids(RESPONSE), "rejected_ids": ids(RESPONSE)} for _ in range(PAIRS)
    ]


def moved(model: nn.Module) -> nn.Module:
    """The policy a little away from the reference, the same for all, so that the loss is not just log 2."""
    policy = copy.deepcopy(model)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1e-3 * torch.randn(parameter.shape, generator=rng).to(parameter.dtype))
    return policy


def build(name: str, model: nn.Module, rows: list[dict[str, list[int]]], folder: str) -> Step:
    """The competitor's step on its own copy of the policy: returns loss and gradients, then moves the weights."""
    policy, reference = moved(model), copy.deepcopy(model).requires_grad_(False)
    if name == "trl_dpo":
        loss_of = trl_loss(policy, reference, rows, folder)
    elif name == "tdpo_dense":
        loss_of = dense_tdpo_loss(policy, reference, rows)
    else:
        loss_of = our_loss(name, policy, reference, rows, folder)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0, fused=True)  # equal inputs in every repetition

    def step() -> tuple[float, dict[str, Tensor]]:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of()
        optimizer.step()
        return loss, {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}

    return step


def padded(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Chosen rows, then rejected ones, padded on the right: what TRL's collator makes."""
    from tokenpo.data import PreferenceCollator

    return PreferenceCollator(pad_token_id=0)(rows)


def trl_loss(policy: nn.Module, reference: nn.Module, rows: list, folder: str) -> Callable[[], float]:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from tokenpo.commands.loading import load_tokenizer

    args = DPOConfig(
        output_dir=folder, per_device_train_batch_size=PAIRS, beta=0.1, max_length=None, report_to="none",
        use_cpu=True, bf16=False, fp16=False, gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    text = Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}] * PAIRS)
    trainer = DPOTrainer(
        model=policy, ref_model=reference, args=args, train_dataset=text, processing_class=load_tokenizer("embedded")
    )
    batch = padded(rows)
    column = torch.arange(batch["input_ids"].shape[1])
    starts, ends = batch["prompt_lengths"][:, None], (batch["prompt_lengths"] + batch["response_lengths"])[:, None]
    inputs = {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "completion_mask": ((column >= starts) & (column < ends)).long(),
    }
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # what train() would set
    return lambda: float(trainer.training_step(trainer.model, dict(inputs)))


def our_loss(name: str, policy: nn.Module, reference: nn.Module, rows: list, folder: str) -> Callable[[], float]:
    from transformers import TrainingArguments

    from tokenpo.commands.loading import load_tokenizer
    from tokenpo.training import PreferenceTrainer

    args = TrainingArguments(
        output_dir=folder, per_device_train_batch_size=PAIRS, report_to="none", use_cpu=True, disable_tqdm=True
    )
    loss, cached = name.removesuffix("_cached"), name.endswith("_cached")
    settings = {"dpo": {"beta": 0.1}, "tdpo2": {"beta": 0.1, "alpha": 0.5}}[loss]
    trainer = PreferenceTrainer(
        policy, args, train_dataset=rows, tokenizer=load_tokenizer("embedded"), loss=loss, loss_args=settings,
        reference=stored(reference, rows, loss, folder) if cached else frozen(reference),
    )  # fmt: skip
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(PAIRS)])
    counts = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return lambda: float(trainer.training_step(trainer.model, dict(batch), num_items_in_batch=counts))


def dense_tdpo_loss(policy: nn.Module, reference: nn.Module, rows: list) -> Callable[[], float]:
    """TDPO2 (arXiv 2404.11999, eq. 18-20) over whole logits, response positions selected by a mask as its code does."""
    batch, beta, alpha = padded(rows), 0.1, 0.5
    column = torch.arange(batch["input_ids"].shape[1])
    starts, ends = batch["prompt_lengths"][:, None], (batch["prompt_lengths"] + batch["response_lengths"])[:, None]
    mask = ((column >= starts) & (column < ends))[:, 1:]
    labels = batch["input_ids"][:, 1:, None]

    def loss_of() -> float:
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        with torch.no_grad():
            log_q = reference(**inputs).logits[:, :-1].float().log_softmax(-1)
        log_p = policy(**inputs).logits[:, :-1].float().log_softmax(-1)
        kl = (log_q.exp() * (log_q - log_p)).sum(-1)
        ratio = (log_p - log_q).gather(2, labels)[..., 0]
        (ratio_w, ratio_l), (kl_w, kl_l) = ((t * mask).sum(1).chunk(2) for t in (ratio, kl))
        loss = -torch.nn.functional.logsigmoid(beta * (ratio_w - ratio_l - alpha * (kl_l - kl_w.detach()))).mean()
        loss.backward()
        return float(loss.detach())

    return loss_of


def frozen(reference: nn.Module) -> Any:
    from tokenpo.reference import make_reference

    return make_reference("model:it", reference, load=lambda folder: reference)


def stored(reference: nn.Module, rows: list, loss: str, folder: str) -> Any:
    """The same reference from the cache: log-probs for DPO, hidden states for the exact KL of TDPO2."""
    from tokenpo.commands.loading import load_tokenizer
    from tokenpo.reference.cache import prepare

    keep = "logps" if loss == "dpo" else "hidden"
    return prepare(f"{folder}/cache", reference, load_tokenizer("embedded"), {"train": rows}, keep=keep, of="copy")


def compare(steps: dict[str, Step], dtype: torch.dtype) -> dict[str, float]:
    """Largest relative difference of loss and gradients from the plain formulation; raises where they part."""
    found = {name: step() for name, step in steps.items()}
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    differences = {}
    for name, (loss, grads) in found.items():
        other = "trl_dpo" if name in ("dpo", "dpo_cached") else "tdpo_dense"
        if name in (other, "trl_dpo"):
            continue
        theirs, their_grads = found[other]
        apart = sum(float((grads[n] - g).double().square().sum()) for n, g in their_grads.items()) ** 0.5
        size = sum(float(g.double().square().sum()) for g in their_grads.values()) ** 0.5
        differences[name] = max(abs(loss - theirs) / abs(theirs), apart / size)
        if differences[name] > tolerance:
            raise SystemExit(f"{name} differs from {other} by {differences[name]:.2e}, relative: nothing is timed")
    return differences


def rate(dtype: torch.dtype) -> float:
    """Multiply-adds a second of matrix products like those of this model, the fastest of a few shapes."""
    found = []
    for rows, inner, columns in ((1024, HIDDEN, 8192), (2048, HIDDEN, INNER), (1024, HIDDEN, 2048)):
        a, b = torch.randn(rows, inner).to(dtype), torch.randn(inner, columns).to(dtype)
        torch.mm(a, b)
        found.append(rows * inner * columns / min(seconds(lambda: torch.mm(a, b)) for _ in range(20)))  # noqa: B023
    return max(found)


def floor_work(rows: list, products: dict[str, float]) -> float:
    """Multiply-adds of the products of a step whose prompts are computed once; attention's own are left out."""
    body = LAYERS * (HIDDEN * 64 * (8 + 4 + 4 + 8) + 3 * HIDDEN * INNER)
    tokens = sum(len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in rows)
    responses = sum(len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in rows)
    return tokens * body * products["body"] + responses * HIDDEN * VOCABULARY * products["head"]


FLOORS = {
    "dpo": {"body": 4, "head": 5}, "dpo_cached": {"body": 3, "head": 4},
    "tdpo2": {"body": 4, "head": 6}, "tdpo2_cached": {"body": 3, "head": 6},
}  # fmt: skip


def measure(dtype_name: str, rounds: int) -> dict[str, Any]:
    dtype = getattr(torch, dtype_name)
    model, rows = qwen3_44m(dtype), make_rows()
    with tempfile.TemporaryDirectory() as folder:
        steps = {name: build(name, model, rows, f"{folder}/{name}") for name in NAMES}
        differences = compare(steps, dtype)
        times = alternate(steps, rounds, warm_up=False)
    fastest = rate(dtype)
    memory = {name: in_child(__file__, ["--child", name, "--dtype", dtype_name])["bytes"] for name in NAMES}
    times_to = {name: median_ratio(times[name], times["trl_dpo"]) for name in NAMES}
    ratios = {
        "time": times_to["dpo"],
        "peak_memory": memory["dpo"] / memory["trl_dpo"],
        "time_cached_reference": times_to["dpo_cached"],
        "tdpo2_time": times_to["tdpo2"],
        "tdpo2_time_cached_reference": times_to["tdpo2_cached"],
        "tdpo2_peak_memory": memory["tdpo2"] / memory["trl_dpo"],
        "tdpo2_time_to_dense": median_ratio(times["tdpo2"], times["tdpo_dense"]),
        "tdpo2_peak_memory_to_dense": memory["tdpo2"] / memory["tdpo_dense"],
    }
    return {
        "ratios": ratios,
        "seconds": {name: statistics.median(taken) for name, taken in times.items()},
        "floor_seconds": {name: floor_work(rows, products) / fastest for name, products in FLOORS.items()},
        "peak_bytes": memory,
        "relative_differences": differences,
    }


def child(name: str, dtype_name: str) -> None:
    """Peak memory of one competitor's step beyond what it held before, in a process of its own."""
    model, rows = qwen3_44m(getattr(torch, dtype_name)), make_rows()
    with tempfile.TemporaryDirectory() as folder:
        step = build(name, model, rows, folder)
        emit({"bytes": extra_peak(step)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child, args.dtype[0])
    results = {name: measure(name, args.rounds) for name in args.dtype}
    for dtype, found in results.items():
        for name in NAMES:
            floor = found["floor_seconds"].get(name)
            beside = f"floor {floor:5.2f} s" if floor else " " * 13
            peak = found["peak_bytes"][name] / 2**20
            print(f"{dtype:9} {name:13} {found['seconds'][name]:6.2f} s  {beside}  peak {peak:6.0f} MiB")
    draw_bars(args.out / "preference_step.png", {d: r["seconds"] for d, r in results.items()}, "seconds a step")
    emit({"ratios": results[args.dtype[0]]["ratios"], "by_dtype": results, "machine": machine()})


if __name__ == "__main__":
    main()
