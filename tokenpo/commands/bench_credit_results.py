"""From what the cells of the credit benchmark found to its results, and what they say of the aims."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from tokenpo.commands.bench_credit import MAIN, Plan, losses_of, pair_name, runs_of, update_name
from tokenpo.commands.bench_credit_pairs import NOT_RUN as LOSSES_NOT_RUN
from tokenpo.commands.bench_credit_pairs import RUNS
from tokenpo.commands.bench_credit_sources import all_excused
from tokenpo.commands.bench_credit_updates import NOT_RUN as RUNS_NOT_RUN
from tokenpo.evaluation.credit_bench import Needed, pairs_needed, ratio, spread

LEVEL = 0.9
"""Pooled AUROC of implicit token rewards that counts as having found the key letters."""
AIM_PAIRS, AIM_UPDATES = 0.5, 0.6
"""Aims, as shares of what plain DPO and sequence-level GRPO need."""
REFERENCE: dict[str, dict[Any, list[float]]] = {
    "pairs": {"dpo": [1000, 2000]},
    "auroc": {512: [0.52, 0.78], 1024: [0.85, 0.94], 2048: [0.985, 0.986], 4096: [0.991, 0.997]},
    "updates": {"grpo": [126, 169], "truth, alone": [47, 62], "truth, to go": [97, 158]},
}
"""Figures measured before, by another implementation, on KeyTok with 32 letters: least and greatest over seeds."""
REAL_REFERENCE = {"pooled_good": 0.60, "pooled_bad": 0.80, "pooled_any": 0.64}
"""The same for `implicit` on rated snippets: SmolLM2-135M-Instruct, LoRA, 60 steps of DPO, 150 held-out pairs."""


def collect(found: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """Everything that the page shows."""
    results: dict[str, Any] = {"plan": dataclasses.asdict(plan), "versions": _versions(), "not_run": {}}
    if "pairs" in plan.parts:
        results["pairs"] = {name: _pairs(found, plan, name) for name in plan.wide}
        left = dict.fromkeys((n for n in RUNS if n not in losses_of(plan)), "a variant: runs with size=full")
        results["not_run"]["pairs"] = {**LOSSES_NOT_RUN, **left}
    if "updates" in plan.parts:
        results["updates"] = _updates(found, plan)
        results["not_run"]["updates"] = {**all_excused(), **RUNS_NOT_RUN}
    if "scores" in plan.parts:
        results["scores"] = {name: _scores(found, name) for name in plan.worlds}
        results["checks"] = _checks(results["scores"], found["lexicons"])
    if plan.real is not None:
        results["real"] = _real(found, plan)
        results["checks"] = {**results.get("checks", {}), **_real_checks(results["real"]["rows"])}
    results["verdicts"] = verdicts(results)
    return results


def _versions() -> dict[str, str]:
    from tokenpo.commands.runs import versions

    return versions()


def _seeds(found: Mapping[str, Any], name: Any) -> list[int]:
    seeds, seed = [], 0
    while name(seed) in found:
        seeds.append(seed)
        seed += 1
    return seeds


def _pairs(found: Mapping[str, Any], plan: Plan, world: str) -> dict[str, Any]:
    """Run -> its points by number of pairs and seed, pairs needed by seed, and their share of plain DPO's."""
    table: dict[str, Any] = {}
    for run in losses_of(plan):
        counts = [c for c in plan.counts if pair_name(world, run, c, 0) in found]
        if not counts:
            continue
        seeds = _seeds(found, lambda s, run=run, counts=counts: pair_name(world, run, counts[-1], s))
        points, needed, intervals = [], [], []
        for seed in seeds:
            cells = [found[pair_name(world, run, count, seed)] for count in counts]
            kept = [{k: v for k, v in cell.items() if k != "pooled_draws"} for cell in cells]
            points += [{"pairs": c, "seed": seed, **figures} for c, figures in zip(counts, kept, strict=True)]
            needed.append(pairs_needed(counts, [c["pooled_auroc"] for c in cells], LEVEL))
            drawn = zip(*(cell["pooled_draws"] for cell in cells), strict=True)
            intervals.append(spread([pairs_needed(counts, values, LEVEL) for values in drawn]))
        table[run] = {"seeds": seeds, "points": points, "needed": needed, "intervals": intervals}
    _add_ratios(table, "dpo")
    return table


def _updates(found: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for run in runs_of(plan):
        seeds = _seeds(found, lambda s, run=run: update_name(run, s))
        cells = [found[update_name(run, seed)] for seed in seeds]
        table[run] = {
            "seeds": seeds,
            "needed": [Needed(*cell["needed"]) for cell in cells],
            "intervals": [spread([Needed(*n) for n in cell["drawn"]]) for cell in cells],
            "final": [cell["scores"][-1] for cell in cells],
        }
    _add_ratios(table, "grpo")
    return table


def _add_ratios(table: dict[str, Any], baseline: str) -> None:
    """Of every run to the baseline, over the seeds that both have."""
    if baseline not in table:
        return
    theirs = table[baseline]["needed"]
    for row in table.values():
        common = min(len(row["needed"]), len(theirs))
        row["ratio"] = dataclasses.asdict(ratio(row["needed"][:common], theirs[:common]))


def _scores(found: Mapping[str, Any], world: str) -> dict[str, Any]:
    parts = {part: found.get(f"{world}-{part}-s0") for part in ("baselines", "sources", "estimators")}
    rows = {
        name: {"kind": part.removesuffix("s"), **figures}
        for part, cell in parts.items()
        if cell
        for name, figures in cell["rows"].items()
    }
    excused = {name: why for cell in parts.values() if cell for name, why in cell.get("excused", {}).items()}
    if not parts["sources"]:
        excused["credit sources that read a model"] = "this task is scored without a model"
    return {"rows": rows, "excused": dict(sorted(excused.items()))}


def _checks(scores: Mapping[str, Any], lexicons: Mapping[str, Any]) -> dict[str, Any]:
    """What the harness must find, and whether it does."""
    rows = scores[MAIN]["rows"] if MAIN in scores else {}
    found: dict[str, Any] = {}
    for name, row in (("oracle", "truth"), ("exact Shapley", "exact_shapley (true score, 8 letters)")):
        if row in rows:
            found[name] = {"auroc": rows[row]["auroc"], "wanted": 1.0, "holds": rows[row]["auroc"] == 1.0}
    if "uniform" in rows:
        found["uniform"] = {"auroc": rows["uniform"]["auroc"], "wanted": 0.5, "holds": rows["uniform"]["auroc"] == 0.5}
    for name, cell in lexicons.items():
        low, high = cell["auroc_any_interval"]
        found[name] = {
            "auroc": cell["auroc_any"], "interval": [low, high], "wanted": 0.5, "holds": low <= 0.5 <= high
        }  # fmt: skip
    return found


def _real(found: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """Rows of the part on real text with their kinds, what is missing and why, the trained models, the texts."""
    from tokenpo.commands.bench_credit_real_scores import excused

    rows: dict[str, Any] = {}
    missing = excused(plan.real_models)
    kinds = {"real-sources-": "source", "real-estimators": "estimator", "real-baselines": "baseline"}
    for name, cell in found.items():
        kind = next((kind for prefix, kind in kinds.items() if name.startswith(prefix)), None)
        if kind is not None:
            rows |= {row: {"kind": kind, **figures} for row, figures in cell["rows"].items()}
            missing |= cell.get("excused", {})
    models = {name: found[f"real-model-{name}"] for name in plan.real_models}
    texts = found["real-baselines"]["texts"]
    return {"rows": rows, "excused": dict(sorted(missing.items())), "models": models, "texts": texts}


def _real_checks(rows: Mapping[str, Any]) -> dict[str, Any]:
    """The lexicon finds its own words, and credit that is the same for all words finds none."""
    found = {}
    for what, row, wanted in (("oracle", "lexicon", 1.0), ("uniform", "equal words", 0.5)):
        values = [rows[row][name] for name in ("good", "bad", "any") if name in rows[row]]
        off = [abs(value - wanted) for value in values]
        worst = values[off.index(max(off))]
        found[f"{what}, real text"] = {"auroc": worst, "wanted": wanted, "holds": worst == wanted}
    return found


# What was found against the aims.


def verdicts(results: Mapping[str, Any]) -> list[str]:
    """A sentence an aim and a reference figure."""
    said = []
    if MAIN in results.get("pairs", {}):
        table = results["pairs"][MAIN]
        said += _against(table, "dpo", "pairs", "plain DPO", AIM_PAIRS, "a token-level preference loss", [])
        said += _published("pairs", table, "preference pairs to a pooled AUROC of 0.9")
    if results.get("updates"):
        table = results["updates"]
        what = "an estimator or redistribution"
        told = [name for name in table if name.startswith("truth") or name.startswith("token_rewards")]
        said += _against(table, "grpo", "updates", "sequence-level GRPO", AIM_UPDATES, what, told)
        said += _published("updates", table, "policy updates to a score of 0.5 a letter")
    if "implicit" in results.get("real", {}).get("rows", {}):
        row = results["real"]["rows"]["implicit"]
        before = ", ".join(f"{value:.2f}" for value in REAL_REFERENCE.values())
        here = ", ".join(f"{row[name]:.2f}" if name in row else "none" for name in REAL_REFERENCE)
        what = "pooled AUROC for good words, bad words, either"
        said.append(f"Reference, plain DPO with a real model on rated snippets, {what}: {before} before, here {here}.")
    return said


def _against(
    table: Mapping[str, Any], baseline: str, unit: str, title: str, aim: float, what: str, told: Sequence[str]
) -> list[str]:
    """Which run needs the smallest share of what the baseline needs, and whether that meets the aim."""
    if baseline not in table:
        return []
    rows = {n: r["ratio"] for n, r in table.items() if n != baseline and n not in told}
    known = {name: r for name, r in rows.items() if r["value"] is not None and not r["unknown"]}
    mark = f"Aim: {what} that needs at most {aim:g} of the {unit} of {title} ({shown(table[baseline]['needed'])})."
    if not known:
        return [f"{mark} Not met: no run can be compared with it at this size."]
    best = min(known, key=lambda name: known[name]["value"])
    share, seeds = known[best]["value"], len(table[best]["needed"])
    met = [name for name, r in known.items() if r["value"] <= aim]
    bound = "at most " if known[best]["at_most"] else ""
    found = f"the least is `{best}` with {shown(table[best]['needed'])}, {bound}{share:.2f} of it ({_seed_word(seeds)})"
    if met:
        return [f"{mark} Met by {', '.join(f'`{n}`' for n in sorted(met, key=lambda n: known[n]['value']))}: {found}."]
    return [f"{mark} Not met: {found}."]


def _seed_word(seeds: int) -> str:
    return "one seed" if seeds == 1 else f"median of {seeds} seeds"


def _published(part: str, table: Mapping[str, Any], what: str) -> list[str]:
    said = []
    for run, (low, high) in REFERENCE[part].items():
        if run not in table:
            continue
        inside = [not n.bound and low <= n.value <= high for n in table[run]["needed"]]
        how = "all within" if all(inside) else "none within" if not any(inside) else f"{sum(inside)} within"
        needed = shown(table[run]["needed"])
        said.append(f"Reference, {what}: `{run}` {low} to {high} before, here {needed} ({how} that spread).")
    return said


def shown(needed: Sequence[Any]) -> str:
    """The numbers of all seeds."""
    return ", ".join(str(Needed(*n)) for n in needed)
