"""What turning rewards into advantages costs beside the model update it feeds.

    python benchmarks/estimators.py            64 groups of 16 responses of 1024 tokens, every estimator and shaper
    python benchmarks/estimators.py --groups 8 smaller

Prints a table and, as its last line, everything as JSON. The update is not run: its time is 6 * parameters * tokens
floating-point operations (forward and backward; attention, head and optimizer left out, which would only raise it) at
the matrix-product rate measured here, the better of float32 and bfloat16. Methods that read (B, T, d) states are
measured on one group and multiplied up; the table says so. What THR and TW-GRPO read of the vocabulary is made in the
pass without gradient; that is measured beside its product with the head, on a few tokens, multiplied up. KTAE and GAE
are also held against direct loops, KTAE's on one group, multiplied by the groups, and TEMPO is run at several lengths.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from tokenpo.advantages import ktae_advantages, ktae_values, prediction_errors, tempo_advantages
from tokenpo.credit import gae
from tokenpo.integrations.rollouts import ERRORS, disagreements
from tokenpo.methods import Method, all_methods
from tokenpo.statistics import LinearHead

PARAMETERS, WIDTH, VOCABULARY = 300e6, 1024, 32768
TARGET = 0.01


def seconds(run: Callable[[], object], budget: float = 1.0) -> float:
    """Median time of a call: once to warm up, then for about `budget` seconds, three times at least."""
    run()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < budget and len(times) < 50):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def matmul_rate() -> dict[str, float]:
    """Floating-point operations a second of a (1024, 1024) by (1024, 4096) product, by type."""
    rates = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a, b = torch.randn(1024, 1024, dtype=dtype), torch.randn(1024, 4096, dtype=dtype)
        rates[name] = 2 * 1024 * 1024 * 4096 / seconds(lambda a=a, b=b: a @ b)
    return rates


def zipf_tokens(rows: int, tokens: int, generator: torch.Generator) -> Tensor:
    """(rows, tokens) ids whose frequency falls as 1 / rank; rows of a group share a beginning of 16 tokens."""
    weights = 1 / torch.arange(1, VOCABULARY + 1, dtype=torch.float64)
    ids = torch.multinomial(weights, rows * tokens, replacement=True, generator=generator).reshape(rows, tokens)
    shared = ids[torch.arange(rows) // 16 * 16, :16]
    return torch.cat([shared, ids[:, 16:]], -1) if tokens > 16 else ids


def inputs_of(method: Method, groups: int, members: int, tokens: int) -> dict[str, object]:
    """Random inputs by argument name, float32."""
    g = torch.Generator().manual_seed(0)
    rows = groups * members

    def per_token(*last: int) -> Tensor:
        return torch.randn(rows, tokens, *last, generator=g)

    builders: dict[str, Callable[[], object]] = {
        "advantages": per_token,
        "anchor": lambda: 0.5,
        "answer_ids": lambda: torch.randint(4, (rows,), generator=g),
        "disagreement": lambda: per_token().abs(),
        "entropy": lambda: per_token().abs(),
        "error_ids": lambda: zipf_tokens(rows, tokens * ERRORS, g).reshape(rows, tokens, ERRORS),
        "errors": lambda: per_token(ERRORS),
        "group": lambda: torch.arange(rows) // members,
        "hidden": lambda: per_token(WIDTH),
        "mask": lambda: torch.arange(tokens) < torch.randint(tokens // 2, tokens + 1, (rows, 1), generator=g),
        "old_logps": lambda: -per_token().abs(),
        "parent": lambda: torch.where(torch.arange(rows) % members == 0, -1, torch.arange(rows) // members * members),
        "prefix_values": lambda: torch.rand(rows, tokens + 1, generator=g),
        "ref_rewards": lambda: torch.randint(2, (rows,), generator=g).float(),
        "rewards": lambda: torch.randint(2, (rows,), generator=g).float(),
        "step": lambda: 40,
        "token_rewards": per_token,
        "tokens": lambda: zipf_tokens(rows, tokens, g),
        "values": per_token,
    }
    parameters = inspect.signature(method.function).parameters.values()
    names = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    return {name: builders[name]() for name in names}


def measure(method: Method, groups: int, members: int, tokens: int) -> tuple[float, str]:
    """Seconds for the whole batch, and how they were extrapolated."""
    once = "hidden" in method.needs
    inputs = inputs_of(method, 1 if once else groups, members, tokens)
    taken = seconds(lambda: method.function(**inputs))
    return (taken * groups, f"one group, times {groups}") if once else (taken, "")


def of_the_vocabulary(members: int, tokens: int, all_tokens: int) -> dict[str, float]:
    """Seconds, for all tokens, of what the pass without gradient makes for THR and TW-GRPO, and of its head's product.

    Measured in float32 on `tokens` positions of one group, products included."""
    g = torch.Generator().manual_seed(0)
    head = LinearHead(torch.randn(VOCABULARY, WIDTH, generator=g) / WIDTH**0.5)
    hidden = torch.randn(members, tokens, WIDTH, generator=g)
    taken = torch.randint(VOCABULARY, (members, tokens), generator=g)
    mask, group = torch.ones_like(taken).bool(), torch.zeros(members, dtype=torch.int64)
    factor = all_tokens / (members * tokens)
    return {
        "product_with_the_head": factor * seconds(lambda: head.logits(hidden)),
        "errors": factor * seconds(lambda: prediction_errors(head.logits(hidden), taken, kept=ERRORS)),
        "disagreement": factor * seconds(lambda: disagreements(hidden, group, mask, head, 1.0)),
    }


def gae_against_loop(rows: int, tokens: int) -> dict[str, float]:
    """Ours, and the recursion column by column."""
    g = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, rows, tokens, generator=g)
    mask = torch.arange(tokens) < torch.randint(tokens // 2, tokens + 1, (rows, 1), generator=g)

    def loop() -> Tensor:
        r, v = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
        advantage = after = r.new_zeros(rows)
        columns = []
        for t in reversed(range(tokens)):
            step = r[:, t] + after - v[:, t] + 0.95 * advantage
            advantage, after = torch.where(mask[:, t], step, advantage), torch.where(mask[:, t], v[:, t], after)
            columns.append(advantage)
        return torch.where(mask, torch.stack(columns[::-1], -1), 0.0)

    apart = (gae(rewards, values, mask)[0] - loop()).abs().max().item()
    return {"seconds": seconds(lambda: gae(rewards, values, mask)), "loop_seconds": seconds(loop),
            "greatest_difference": apart}  # fmt: skip


def direct_ktae(rewards: list[float], rows: list[list[int]]) -> list[list[float]]:
    """Key-token values of one group as one would write them down: token by token."""
    right = [reward > 0 for reward in rewards]
    n_c, n_w = sum(right), len(right) - sum(right)
    held = [set(row) for row in rows]
    counts: tuple[Counter[int], Counter[int]] = (Counter(), Counter())
    for row, good in zip(rows, right, strict=True):
        counts[not good].update(row)
    m = [sum(count.values()) for count in counts]

    def log_choose(n: int, k: int) -> float:
        return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)

    def bits(*parts: int) -> float:
        total = sum(parts)
        return -sum(p / total * math.log2(p / total) for p in parts if p) if total else 0.0

    def value(token: int) -> float:
        a = sum(token in ids for ids, good in zip(held, right, strict=True) if good)
        b = sum(token in ids for ids, good in zip(held, right, strict=True) if not good)
        n, total = a + b, n_c + n_w
        log_p = {
            k: log_choose(n_c, k) + log_choose(n_w, n - k) - log_choose(total, n)
            for k in range(max(0, n - n_w), min(n, n_c) + 1)
        }
        p = sum(math.exp(x) for x in log_p.values() if x <= log_p[a] + 1e-9)
        fisher = 0.0 if p >= 1 - 1e-9 else math.exp(-2 * p)
        gain = bits(n_c, n_w) - n / total * bits(a, b) - (total - n) / total * bits(n_c - a, n_w - b)
        share = [counts[side][token] / m[side] for side in (0, 1)]
        slope = [2.0 * (0.5 + 0.5 * m[side] / (sum(m) / 2)) for side in (0, 1)]
        t_c, t_w = (3.0 * x / (x + k) for x, k in zip(share, slope, strict=True))
        gap = math.asin(math.sqrt(a / (n_c + 1e-10))) - math.asin(math.sqrt(b / (n_w + 1e-10)))
        gap += t_c / (t_w + 1e-5) - t_w / (t_c + 1e-5)
        return math.tanh((fisher + gain) * gap / 2 / 2)

    values = {token: value(token) for token in set().union(*held)}
    return [[values[token] for token in row] for row in rows]


def ktae_against_loop(groups: int, members: int, tokens: int) -> dict[str, float]:
    """Ours on everything; the loop on one group, once a distinct token id, and what once a token would take."""
    inputs = inputs_of(all_methods("estimator")["ktae"], groups, members, tokens)
    rewards, group, mask, ids = (inputs[name] for name in ("rewards", "group", "mask", "tokens"))
    ours = seconds(lambda: ktae_advantages(rewards, group, mask, ids))
    mixed = next(k for k in range(groups) if 0 < rewards[group == k].sum() < members)
    rows = (group == mixed).nonzero().squeeze(-1)
    responses = [ids[row][mask[row]].tolist() for row in rows]
    start = time.perf_counter()
    direct = direct_ktae(rewards[rows].tolist(), responses)
    distinct = (time.perf_counter() - start) * groups
    each = distinct * sum(len(r) for r in responses) / len({token for r in responses for token in r})
    values = ktae_values(rewards.double(), group, mask, ids)
    pairs = zip(rows, direct, strict=True)
    apart = max((values[row][mask[row]] - torch.tensor(d, dtype=torch.float64)).abs().max().item() for row, d in pairs)
    return {
        "seconds": ours,
        "loop_over_tokens_seconds": each,
        "loop_over_distinct_ids_seconds": distinct,
        "times_faster_than_loop_over_tokens": each / ours,
        "times_faster_than_loop_over_distinct_ids": distinct / ours,
        "greatest_difference": apart,
    }


def tempo_linearity(rows: int) -> dict[str, object]:
    """Seconds by tokens, and the exponent of a power law through them: 1 is linear."""
    lengths, times = [256, 512, 1024, 2048, 4096], []
    for tokens in lengths:
        inputs = inputs_of(all_methods("estimator")["tempo"], rows // 16, 16, tokens)
        times.append(seconds(lambda inputs=inputs: tempo_advantages(**inputs)))
    x, y = ([math.log(v) for v in values] for values in (lengths, times))
    slope = statistics.linear_regression(x, y).slope
    return {"tokens": [rows * n for n in lengths], "seconds": times, "exponent": slope}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--groups", type=int, default=64)
    parser.add_argument("--members", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--only", nargs="*", help="names of methods")
    arguments = parser.parse_args()
    shape = arguments.groups, arguments.members, arguments.tokens
    rates = matmul_rate()
    update = 6 * PARAMETERS * math.prod(shape) / max(rates.values())
    print(f"{torch.get_num_threads()} threads, products at", *(f"{n} {r / 1e9:.0f} GFLOP/s" for n, r in rates.items()))
    print(f"update of {PARAMETERS:.0e} parameters on {math.prod(shape)} tokens: {update:.0f} s (extrapolated)\n")
    found = {**all_methods("estimator"), **all_methods("shaper")}
    rows = []
    for name, method in found.items():
        if arguments.only and name not in arguments.only:
            continue
        taken, how = measure(method, *shape)
        share = taken / update
        rows.append({"method": name, "kind": method.kind, "seconds": taken, "share": share, "extrapolated": how})
        mark = "" if share <= TARGET else "   above 1 %"
        print(f"{name:32} {taken:10.4f} s {100 * share:10.5f} %  {how}{mark}", flush=True)
    report = {
        "shape": dict(zip(("groups", "members", "tokens"), shape, strict=True)),
        "threads": torch.get_num_threads(),
        "matmul_flops": rates,
        "update_seconds": update,
        "methods": rows,
    }
    if not arguments.only or "ktae" in arguments.only:
        report["ktae"] = ktae_against_loop(*shape)
    if not arguments.only or "tempo" in arguments.only:
        report["tempo"] = tempo_linearity(shape[0] * shape[1])
    if not arguments.only or "gae" in arguments.only:
        report["gae"] = gae_against_loop(shape[0] * shape[1], shape[2])
    if not arguments.only or {"thr", "nthr", "tw_grpo"} & {*arguments.only}:
        report["vocabulary"] = of_the_vocabulary(shape[1], 16, math.prod(shape))
    for name in ("ktae", "tempo", "gae", "vocabulary"):
        if name in report:
            print(f"\n{name}: {report[name]}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
