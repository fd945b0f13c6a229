"""The page of the credit benchmark and its picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenpo.commands.bench_credit import MAIN
from tokenpo.commands.bench_credit_real_page import draw_real, figure, interval, number, real_section
from tokenpo.commands.bench_credit_results import LEVEL, REFERENCE, shown

INTRODUCTION = """\
# Who finds the tokens that matter

Tasks whose true token credit is known by construction, and what every credit source, every token-level estimator and
every token-level preference loss makes of them.

    {command}

writes this page; a killed run goes on where it was.

- **KeyTok**: letters of a Markov chain, four of them worth +1 and four -1, hidden; under prompt `B` the signs flip. The
  score is the sum, and preferences follow its difference at temperature 1. Key letters are as frequent as others, so
  surprisal and entropy say nothing of them. *noisy*: preferences at temperature 4, and as much noise on rewards.
- **SlipChain**: digits that slip, with exact advantages; *copy* slips stay, *sum* slips are carried on. That a slip
  happened is plain from its probability, so the figure to look at is the correlation with the exact advantage.
- **Reviews**: the embedded texts, compared by word.

All rows of a task score the same responses. A model is tiny and starts from supervised training on the task's own text;
what sources read (a DPO policy, reward models) was trained on {pairs} pairs. Nothing is tuned: hyperparameters are
defaults, but for beta, which is 1: there the optimum of DPO is that of the score less tau times the KL. Rows in italics
are given what no method knows: the truth, or what the task's own process says.
"""
COLUMNS = """\
*AUROC*: within a response, helpful tokens above and harmful ones below the rest; 0.5 for credit that is the same on all
tokens of a response. *any*: tokens that matter, whichever way, by the size of credit. *AP*, *P@k*: average precision
and precision@k of the same, {chance:.2f} by chance. *pooled*: helpful tokens over all responses together. *r*:
correlation with the truth. Brackets are 95% intervals over responses. Milliseconds and passes through a model are those
of a response, loading and training left out."""
LEXICONS = "Surprisal and entropy are means over lexicons, for in a single one key letters may happen to be rare."
PAIRS = """\
Credit is the policy's implicit token reward after {steps} steps of 32 pairs; the cells are AUROC, accuracy and margin
on held-out pairs, the last two since they alone do not show that credit is right. *share*: of what plain DPO needs, the
median over the seeds that both have. Intervals come from drawing held-out responses."""
UPDATES = """\
On-policy policy gradient, four prompts with 16 responses each, learning rate 5e-4; the mean score of the last {window}
updates decides. Rows with a comma train on token rewards: *alone*, a token's own reward; *to go*, with all later ones;
by the `truth`, by the `implicit` rewards of a DPO policy, by differences of the values of a `bradley_terry` reward
model or of a `value` model, which have seen {pairs} pairs before. *share*: of what GRPO needs."""


def write_page(results: Mapping[str, Any], path: Path, command: str) -> None:
    """The page at `path`, the picture beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = draw(results, path.with_suffix(".png"))
    parts = [INTRODUCTION.format(command=command, pairs=results["plan"]["counts"][-1])]
    if results["verdicts"]:
        parts.append("## Against our aims\n\n" + "\n".join(f"- {line}" for line in results["verdicts"]) + "\n")
    if picture is not None:
        parts.append(f"![AUROC by pairs, updates needed, AUROC of every source]({picture.name})\n")
    if "checks" in results:
        parts.append(_checks(results["checks"]))
    if "pairs" in results:
        parts += [_pairs(world, table, results) for world, table in results["pairs"].items()]
        parts.append(_reasons("Not among these losses", results["not_run"]["pairs"]))
    if "updates" in results:
        parts += [_updates(results), _reasons("Not among these runs", results["not_run"]["updates"])]
    for world, found in results.get("scores", {}).items():
        parts += [_scores(world, found), _reasons(f"Not scored on {world}", found["excused"])]
    if "real" in results:
        parts += [real_section(results), _reasons("Not among these", results["real"]["excused"])]
    parts.append(_made_of(results))
    path.write_text("\n".join(parts), encoding="utf-8")


def _checks(checks: Mapping[str, Any]) -> str:
    lines = ["## The harness checks itself", "", "| what | AUROC | wanted | holds |", "|---|---|---|---|"]
    for name, row in checks.items():
        value = f"{row['auroc']:.3f}" + (interval(row["interval"], 3) if "interval" in row else "")
        lines.append(f"| {name} | {value} | {row['wanted']} | {'yes' if row['holds'] else '**no**'} |")
    lines += ["", LEXICONS, ""] if "surprisal" in checks else [""]
    return "\n".join(lines)


def _pairs(world: str, table: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    if not table:
        return ""
    counts = sorted({p["pairs"] for row in table.values() for p in row["points"]})
    lines = [
        f"## Preference pairs to a pooled AUROC of {LEVEL:g}: {world}", "",
        PAIRS.format(steps=results["plan"]["steps"]), "",
        "| loss | pairs needed | interval | share | " + " | ".join(f"{c} pairs" for c in counts) + " |",
        "|---" * (4 + len(counts)) + "|",
    ]  # fmt: skip
    order = sorted(table, key=lambda n: (_first(table[n]["needed"]), n))
    for name in order:
        row = table[name]
        cells = [_points([p for p in row["points"] if p["pairs"] == c]) for c in counts]
        lines.append(
            f"| `{name}` | {shown(row['needed'])} | {_intervals(row['intervals'])} | {_share(row)} | "
            + " | ".join(cells) + " |"
        )  # fmt: skip
    if world == MAIN:
        before = "; ".join(f"{low:g} to {high:g} at {n}" for n, (low, high) in REFERENCE["auroc"].items())
        lines += ["", f"Plain DPO measured before, by another implementation: AUROC {before}."]
    return "\n".join([*lines, ""])


def _points(points: Sequence[Mapping[str, Any]]) -> str:
    """A seed after another: AUROC, accuracy, margin."""
    return "; ".join(f"{p['pooled_auroc']:.2f}, {p['accuracy']:.2f}, {p['margin']:.1f}" for p in points)


def _updates(results: Mapping[str, Any]) -> str:
    table = results["updates"]
    lines = [
        f"## Policy updates to a score of 0.5 a letter: {MAIN}", "",
        UPDATES.format(window=results["plan"]["window"], pairs=results["plan"]["counts"][-1]), "",
        "| run | updates needed | interval | share | last score |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for name in sorted(table, key=lambda n: (_first(table[n]["needed"]), n)):
        row = table[name]
        final = ", ".join(f"{x:.2f}" for x in row["final"])
        interval = _intervals(row["intervals"])
        lines.append(f"| {name} | {shown(row['needed'])} | {interval} | {_share(row)} | {final} |")
    return "\n".join([*lines, ""])


def _scores(world: str, found: Mapping[str, Any]) -> str:
    rows = found["rows"]
    chance = next((row["chance"] for row in rows.values()), math.nan)
    lines = [
        f"## Scored on the same responses: {world}", "", COLUMNS.format(chance=chance), "",
        "| credit | kind | AUROC | any | AP | P@k | pooled | r | ms | passes |", "|---" * 10 + "|",
    ]  # fmt: skip
    for name in sorted(rows, key=lambda n: (-(rows[n].get("auroc") or 0.0), n)):
        row = rows[name]
        value = [figure(row, key) for key in ("auroc", "auroc_any", "average_precision", "precision_at_k")]
        value += [number(row.get("pooled_auroc"), 3), number(row.get("pearson"), 2)]
        value += [number(row.get("milliseconds"), 2), number(row.get("passes"), 1)]
        shown_name = f"*{name}*" if row["kind"] == "baseline" else f"`{name}`"
        lines.append(f"| {shown_name} | {row['kind']} | " + " | ".join(value) + " |")
    return "\n".join([*lines, ""])


def _made_of(results: Mapping[str, Any]) -> str:
    plan = results["plan"]
    names = ("seeds", "reference_seeds", "steps", "start_steps", "model_steps", "groups", "updates")
    facts = [f"{name.replace('_', ' ')} {plan[name]}" for name in names]
    facts += [f"{name} {version}" for name, version in results["versions"].items()]
    return "\n".join(["## Made of", "", ", ".join(facts) + ".", ""])


def _reasons(title: str, reasons: Mapping[str, str]) -> str:
    """Names by reason."""
    by_reason: dict[str, list[str]] = {}
    for name, why in reasons.items():
        by_reason.setdefault(why, []).append(f"`{name}`")
    said = [f"{', '.join(names)}: {why}" for why, names in by_reason.items()]
    return f"{title}:\n\n" + "\n".join(f"- {line}." for line in said) + "\n" if said else ""


def _first(needed: Sequence[Any]) -> float:
    value, bound = needed[0]
    return value + (1e9 if bound == ">" else 0.0)


def _share(row: Mapping[str, Any]) -> str:
    found = row.get("ratio")
    if not found or found["value"] is None:
        return ""
    return ("≤ " if found["at_most"] else "") + f"{found['value']:.2f}" + ("?" if found["unknown"] else "")


def _intervals(intervals: Sequence[Sequence[float | None]]) -> str:
    ends = [["no end" if e is None or math.isinf(e) else f"{e:.0f}" for e in pair] for pair in intervals]
    return ", ".join(f"{low} to {high}" if low != high else low for low, high in ends)


# The picture.


def draw(results: Mapping[str, Any], path: Path) -> Path | None:
    """AUROC by pairs, updates needed, AUROC of every source, and on real text; None where there is nothing to draw."""
    panels = [
        (key, painter, data)
        for key, painter, data in (
            ("pairs", _draw_pairs, results.get("pairs", {}).get(MAIN)),
            ("updates", _draw_updates, results.get("updates")),
            ("scores", _draw_scores, results.get("scores", {}).get(MAIN, {}).get("rows")),
            ("real", draw_real, results.get("real", {}).get("rows")),
        )
        if data
    ]
    if not panels:
        return None
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = max((len(data) for key, _, data in panels if key != "pairs"), default=16)
    figure, axes = plt.subplots(
        1, len(panels), figsize=(6.0 * len(panels), max(5.0, 0.17 * bars)), layout="constrained", squeeze=False
    )
    for axis, (_, painter, data) in zip(axes[0], panels, strict=True):
        painter(axis, data)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _draw_pairs(axis: Any, table: Mapping[str, Any]) -> None:
    import matplotlib

    colours: Any = matplotlib.colormaps["tab20"]
    for i, (name, row) in enumerate(table.items()):
        for seed in row["seeds"]:
            points = [p for p in row["points"] if p["seed"] == seed]
            axis.plot(
                [p["pairs"] for p in points], [p["pooled_auroc"] for p in points], marker="o", markersize=4,
                color="black" if name == "dpo" else colours(i % 20), linewidth=2.5 if name == "dpo" else 1.2,
                label=name if seed == row["seeds"][0] else None, zorder=3 if name == "dpo" else 2,
            )  # fmt: skip
    axis.axhline(LEVEL, color="0.5", linestyle="--", linewidth=1)
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted({p["pairs"] for row in table.values() for p in row["points"]}))
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.set_xlabel("preference pairs")
    axis.set_ylabel("pooled AUROC of implicit token rewards")
    axis.legend(frameon=False, fontsize=7)
    axis.grid(alpha=0.25)


def _draw_updates(axis: Any, table: Mapping[str, Any]) -> None:
    names = sorted(table, key=lambda n: (-_first(table[n]["needed"]), n))
    values = [float(table[n]["needed"][0][0]) for n in names]
    reached = [table[n]["needed"][0][1] != ">" for n in names]
    of_reached = ["#2a6f97" if ok else "#c9ced6" for ok in reached]
    axis.barh(names, values, color=["#1a1c21" if n == "grpo" else c for n, c in zip(names, of_reached, strict=True)])
    axis.set_xlabel("policy updates to a score of 0.5 a letter (grey: not reached)")
    axis.tick_params(axis="y", labelsize=7)
    axis.grid(alpha=0.25, axis="x")


def _draw_scores(axis: Any, rows: Mapping[str, Any]) -> None:
    colours = {"baseline": "#e09f3e", "source": "#2a6f97", "estimator": "#d1495b"}
    names = sorted((n for n in rows if rows[n].get("auroc") is not None), key=lambda n: (rows[n]["auroc"], n))
    for name in names:
        row = rows[name]
        low, high = (row["auroc"] if end is None else end for end in row["auroc_interval"])
        axis.plot([low, high], [name, name], color=colours[row["kind"]], linewidth=2)
        axis.plot([row["auroc"]], [name], marker="o", markersize=4, color=colours[row["kind"]])
    axis.axvline(0.5, color="0.5", linestyle="--", linewidth=1)
    for kind, colour in colours.items():
        axis.plot([], [], color=colour, marker="o", label=kind)
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    axis.set_xlabel("AUROC within a response")
    axis.tick_params(axis="y", labelsize=6)
    axis.grid(alpha=0.25, axis="x")
