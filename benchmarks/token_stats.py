"""Token statistics with their gradients: tokenpo against what else there is, on the same tensors in the same run.

    python benchmarks/token_stats.py --n 2048 --d 1024 --v 131072 --dtype bfloat16 [--frozen]
    python benchmarks/token_stats.py --scan V

Two works: a DPO loss (log-probs of policy and reference) and a TDPO2 loss (also the exact KL(reference || policy)).
Competitors: dense PyTorch, TRL's tiled kernels, Liger's fused linear DPO, Apple's cut-cross-entropy (the form it has
for a CPU is compiled dense PyTorch). One that is not installed, or fails, is left out and named. Their losses and
gradients are compared with the dense ones before anything is timed. The floor is the time of the matrix products
alone, measured in every round: their tiles, at the fastest of three widths and two layouts for each product.
Memory is what a process of its own takes above its inputs and above the gradients it returns.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from common import Products, alternate, draw_bars, draw_scan, emit, extra_peak, in_child, machine, median_ratio
from torch import Tensor
from torch.nn import functional

from tokenpo.statistics import LinearHead, linear_token_stats

BETA, ALPHA, PAIRS = 0.1, 0.5, 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# forward products without and with a gradient to come; a trained head adds the weight's gradient
FORWARD_PRODUCTS = {"dpo": 3, "tdpo2": 4}
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
SCANS = {"N": (512, 1024, 2048, 4096), "V": (8192, 16384, 32768, 65536), "d": (256, 512, 1024, 2048)}


class Inputs(NamedTuple):
    """hidden (N, d) and weight (V, d) with gradients, the reference's without, tokens (N,)."""

    hidden: Tensor
    weight: Tensor
    ref_hidden: Tensor
    ref_weight: Tensor
    tokens: Tensor


def make(n: int, d: int, v: int, dtype: torch.dtype, frozen: bool) -> Inputs:
    """Logits of standard deviation 2; the reference is near the policy. Chosen responses first, then rejected."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=generator)
    ref_hidden = (hidden + 0.3 * torch.randn(n, d, generator=generator)).to(device, dtype)
    weight = (torch.randn(v, d, generator=generator) * (2 / d**0.5)).to(device, dtype)
    # frozen: the head of the reference is the policy's, as under LoRA with the adapter off
    noise = torch.randn(v, d, generator=generator).mul_(0.2 / d**0.5).to(device, dtype)
    ref_weight = weight if frozen else weight + noise
    tokens = torch.randint(v, (n,), generator=generator).to(device)
    return Inputs(
        hidden.to(device, dtype).requires_grad_(), weight.requires_grad_(not frozen), ref_hidden, ref_weight, tokens
    )


def preference_loss(logps: Tensor, ref_logps: Tensor, ref_kl: Tensor | None = None) -> Tensor:
    """Mean over pairs of -log sigmoid(beta (chosen - rejected)); TDPO2's where a KL is given. (N,) each."""
    chosen, rejected = (logps - ref_logps).view(2, PAIRS, -1).sum(-1)
    z = chosen - rejected
    if ref_kl is not None:
        kl_chosen, kl_rejected = ref_kl.view(2, PAIRS, -1).sum(-1)
        z = z - ALPHA * (kl_rejected - kl_chosen.detach())
    return -functional.logsigmoid(BETA * z).mean()


def tokenpo_loss(work: str, x: Inputs) -> Tensor:
    values = linear_token_stats(
        x.hidden,
        LinearHead(x.weight),
        x.tokens,
        outputs=("logps", "ref_logps", "ref_kl") if work == "tdpo2" else ("logps", "ref_logps"),
        ref_hidden=x.ref_hidden,
        ref_head=LinearHead(x.ref_weight),
    )
    return preference_loss(values["logps"], values["ref_logps"], values.get("ref_kl"))


def dense_loss(work: str, x: Inputs) -> Tensor:
    picked = x.tokens[:, None]
    with torch.no_grad():
        log_q = torch.log_softmax((x.ref_hidden @ x.ref_weight.T).float(), -1)
        ref_logps = log_q.gather(1, picked)[:, 0]
        if work == "dpo":
            del log_q
    log_p = torch.log_softmax((x.hidden @ x.weight.T).float(), -1)
    logps = log_p.gather(1, picked)[:, 0]
    if work == "dpo":
        return preference_loss(logps, ref_logps)
    return preference_loss(logps, ref_logps, (log_q.exp() * (log_q - log_p)).sum(-1))


def trl_loss(work: str, x: Inputs) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def logps(hidden: Tensor, weight: Tensor) -> Tensor:
        return ChunkedLogProbFunction.apply(hidden, weight, None, x.tokens, 1.0, 32768, None, 1.0, ())[0]

    with torch.no_grad():
        ref_logps = logps(x.ref_hidden, x.ref_weight)
    ref_kl = None
    if work == "tdpo2":  # beta 0: KL(teacher || student)
        arguments = (x.hidden, x.weight, None, x.ref_hidden, x.ref_weight, None, 0.0)
        ref_kl = ChunkedDivergenceFunction.apply(*arguments)[0]
    return preference_loss(logps(x.hidden, x.weight), ref_logps, ref_kl)


def liger_loss(work: str, x: Inputs) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    shape = (2 * PAIRS, len(x.tokens) // (2 * PAIRS))
    module = LigerFusedLinearDPOLoss(beta=BETA, compute_nll_loss=False, compiled=False, use_ref_model=True)
    hidden, ref_hidden = (h.view(*shape, -1) for h in (x.hidden, x.ref_hidden))
    found = module(x.weight, hidden, x.tokens.view(shape), ref_input=ref_hidden, ref_weight=x.ref_weight)
    return found[0] if isinstance(found, tuple) else found


def cce_loss(work: str, x: Inputs) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    def logps(hidden: Tensor, weight: Tensor) -> Tensor:
        way = "cce" if hidden.is_cuda else "torch_compile"
        return -linear_cross_entropy(hidden, weight, x.tokens, reduction="none", impl=way)

    with torch.no_grad():
        ref_logps = logps(x.ref_hidden, x.ref_weight)
    return preference_loss(logps(x.hidden, x.weight), ref_logps)


LOSSES: dict[str, Callable[[str, Inputs], Tensor]] = {
    "tokenpo": tokenpo_loss,
    "dense": dense_loss,
    "trl": trl_loss,
    "liger": liger_loss,
    "cut_cross_entropy": cce_loss,
}
# these have no KL between two models
ONLY_DPO = ("liger", "cut_cross_entropy")


def step(name: str, work: str, x: Inputs) -> list[Tensor]:
    """Loss and gradients, freshly."""
    x.hidden.grad = x.weight.grad = None
    loss = LOSSES[name](work, x)
    loss.backward()
    leaves = (x.hidden, x.weight)
    return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def usable(names: list[str], work: str, x: Inputs, dtype: str) -> tuple[list[str], dict[str, str], dict[str, float]]:
    """Names whose results equal the dense ones, why the others are left out, and the largest relative differences."""
    left_out, differences = {}, {}
    expected = step("dense", work, x)
    for name in names:
        if name == "dense":
            continue
        if work != "dpo" and name in ONLY_DPO:
            left_out[name] = "has no KL between two models"
            continue
        try:
            found = step(name, work, x)
        except Exception as problem:  # whatever a competitor raises is the finding
            left_out[name] = f"{type(problem).__name__}: {str(problem).strip()[:200]}"
            continue
        pairs = zip(found, expected, strict=True)
        differences[name] = max(float((a - b).float().norm() / b.float().norm()) for a, b in pairs)
        if not differences[name] <= TOLERANCE[dtype]:
            left_out[name] = f"differs from dense by {differences[name]:.2g}"
    x.hidden.grad = x.weight.grad = None
    return [name for name in names if name not in left_out], left_out, differences


def peak(name: str, work: str, options: argparse.Namespace, v: int | None = None) -> int:
    """Bytes, measured in a child: what `step` takes above its inputs and the gradients it leaves."""
    arguments = ["--child", name, "--work", work, "--dtype", options.dtype, "--n", str(options.n)]
    arguments += ["--d", str(options.d), "--v", str(v or options.v), *(["--frozen"] if options.frozen else [])]
    return int(in_child(__file__, arguments))


def child_peak(options: argparse.Namespace) -> int:
    x = make(options.n, options.d, options.v, DTYPES[options.dtype], options.frozen)
    small = make(64, options.d, 256, DTYPES[options.dtype], options.frozen)
    step(options.child, options.work, small)  # libraries load and set up outside the measurement
    taken = extra_peak(lambda: step(options.child, options.work, x))
    leaves = (x.hidden, x.weight)
    return taken - sum(leaf.grad.nbytes for leaf in leaves if leaf.grad is not None)


def measure(work: str, options: argparse.Namespace) -> dict[str, Any]:
    """Times, floor, ratios and peaks of one work at one size."""
    x = make(options.n, options.d, options.v, DTYPES[options.dtype], options.frozen)
    names, left_out, differences = usable(options.only, work, x, options.dtype)
    products = Products(x.hidden, x.weight)
    floors: list[float] = []
    rates: dict[str, list[float]] = {}

    def floor() -> None:
        found = products.measure()
        for kind, taken in found.items():
            rates.setdefault(kind, []).append(2e-9 * options.n * options.d * options.v / taken)
        backward = found["d_hidden"] + (0 if options.frozen else found["d_weight"])
        floors.append(FORWARD_PRODUCTS[work] * found["forward"] + backward)

    runs = {name: (lambda name=name: step(name, work, x)) for name in names}
    times = alternate({"floor": floor, **runs}, options.rounds, warm_up=False)
    floors = floors[-options.rounds :]
    found = {
        "seconds": {name: median(times[name]) for name in names},
        "floor_seconds": median(floors),
        "rates_gflops": {kind: round(median(values)) for kind, values in rates.items()},
        "over_floor": {name: median_ratio(times[name], floors) for name in names},
        "ratios": {name: median_ratio(times["tokenpo"], times[name]) for name in names if name != "tokenpo"},
        "differences": differences,
        "left_out": left_out,
        "rounds": {"floor": floors, **{name: times[name] for name in names}},
    }
    if options.memory:
        del x, runs, products
        found["extra_peak_bytes"] = {name: peak(name, work, options) for name in names}
        found["extra_peak_bytes_half_v"] = peak("tokenpo", work, options, options.v // 2)
        base = found["extra_peak_bytes"].get("dense")
        found["memory_ratio"] = found["extra_peak_bytes"]["tokenpo"] / base if base else None
    return found


def table(work: str, found: dict[str, Any]) -> None:
    print(f"{work}: floor {found['floor_seconds']:.3f} s, products at {found['rates_gflops']} GFLOP/s")
    for name, taken in found["seconds"].items():
        memory = found.get("extra_peak_bytes", {}).get(name)
        extra = "" if memory is None else f"  extra peak {memory / 2**20:8.0f} MiB"
        print(f"  {name:18s} {taken:8.3f} s  {found['over_floor'][name]:6.2f} x floor{extra}", flush=True)
    for name, reason in found["left_out"].items():
        print(f"  {name:18s} left out: {reason}")


def scan(options: argparse.Namespace) -> dict[str, Any]:
    """Times of TDPO2 along one of N, V, d, the others as given."""
    found = {}
    for value in SCANS[options.scan]:
        at = argparse.Namespace(**{**vars(options), options.scan.lower(): value, "memory": False})
        found[value] = measure("tdpo2", at)
        print(f"{options.scan} = {value}")
        table("tdpo2", found[value])
    names = [name for name in options.only if all(name in one["seconds"] for one in found.values())]
    series = {name: [one["seconds"][name] for one in found.values()] for name in names}
    series["products alone"] = [one["floor_seconds"] for one in found.values()]
    picture = draw_scan(options.picture, list(found), series, (options.scan, "seconds, forward and backward of TDPO2"))
    return {"scan": options.scan, "values": found, "picture": picture}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=2048, help="response tokens, a multiple of 8")
    parser.add_argument("--d", type=int, default=1024, help="width of the hidden states")
    parser.add_argument("--v", type=int, default=131072, help="vocabulary")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument(
        "--frozen", action="store_true", help="the head is frozen, and the reference's head is the same"
    )
    parser.add_argument("--work", choices=list(FORWARD_PRODUCTS), action="append", help="default: both")
    parser.add_argument("--only", nargs="+", choices=list(LOSSES), default=list(LOSSES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scan", choices=list(SCANS), help="TDPO2 along this size")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--picture", type=Path, default=Path("benchmarks/out/token_stats.png"))
    parser.add_argument("--child", choices=list(LOSSES), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.n % (2 * PAIRS):
        parser.error(f"--n must be a multiple of {2 * PAIRS}")
    if "tokenpo" not in options.only:
        options.only = ["tokenpo", *options.only]
    return options


def main() -> None:
    options = parse(sys.argv[1:])
    if options.child:
        options.work = options.work[0]
        emit_number = child_peak(options)
        print(emit_number)
        return
    sizes = {name: getattr(options, name) for name in ("n", "d", "v", "dtype", "frozen")}
    if options.scan:
        emit({"benchmark": "token_stats", **sizes, "machine": machine(), **scan(options)})
        return
    works = options.work or list(FORWARD_PRODUCTS)
    found = {}
    for work in works:
        found[work] = measure(work, options)
        table(work, found[work])
    panels = {
        f"{work}, N={options.n} d={options.d} V={options.v} {options.dtype}": {
            "products alone": found[work]["floor_seconds"],
            **found[work]["seconds"],
        }
        for work in works
    }
    picture = draw_bars(options.picture, panels, "seconds, forward and backward")
    emit({"benchmark": "token_stats", **sizes, "machine": machine(), "works": found, "picture": picture})


if __name__ == "__main__":
    main()
