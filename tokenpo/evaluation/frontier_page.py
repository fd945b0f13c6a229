"""The frontier benchmark for readers: a page of two tables and one picture."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

GROUPS: dict[str, tuple[str, ...]] = {
    "KL or risk in the margin": ("tdpo1", "tdpo2", "ra_dpo1", "ra_dpo2"),
    "token weights": (
        "tgdpo", "bmc", "bmc_own_weights", "bmc_ipo", "critical_dpo", "critical_dpo_per_position"
    ),
    "learned masks, regularisers": (
        "sparsepo", "sparsepo_common", "sparsepo+mapo", "t_reg", "t_reg_static", "t_reg_simpo"
    ),
    "links and lengths": ("ipo", "ipo_sum", "hinge", "robust_dpo", "dpo_norm", "ld_dpo"),
    "no reference, no pairs": ("simpo", "orpo", "orpo_with_prompt", "kto", "apo_zero_unpaired", "sft"),
    "distilled, two prompts": (
        "aligndistil", "aligndistil_constant", "aligndistil_theorem1", "mapl_intra", "meet"
    ),
}  # fmt: skip
"""Panels of the picture; a loss in none of them gets a panel of the rest."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f3c8d", "#8c8c00")
STYLES = ("-", "-", "-", "--", "--", "--", "-.", "-.")
ANCHOR = "dpo"
"""In every panel, and what losses are set against."""


def groups_of(names: Sequence[str]) -> dict[str, list[str]]:
    """Panel -> the losses of `names` in it, empty panels left out."""
    placed = {name for members in GROUPS.values() for name in members}
    found = {title: [n for n in members if n in names] for title, members in GROUPS.items()}
    found["others"] = [n for n in names if n not in placed and n != ANCHOR]
    return {title: members for title, members in found.items() if members}


def draw(path: Path, curves: Mapping[str, Mapping[str, Sequence[float]]], best: Mapping[str, Sequence[float]]) -> Path:
    """One picture: reward over KL above, entropy over KL below, a column a group of losses.

    `curves`: loss -> {"kl", "reward", "entropy"}, NaN where it did not go; `best` the same of the optimum.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = groups_of(list(curves)) or {"DPO": []}
    figure, axes = plt.subplots(
        2, len(panels), figsize=(max(3.1 * len(panels), 5.0), 6.4), sharex=True, sharey="row", squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for column, (title, members) in enumerate(panels.items()):
        for row, what in enumerate(("reward", "entropy")):
            axis = axes[row][column]
            axis.plot(best["kl"], best[what], color="0.6", linewidth=1.2, linestyle=":", label="best possible")
            if ANCHOR in curves:
                axis.plot(curves[ANCHOR]["kl"], curves[ANCHOR][what], color="black", linewidth=1.6, label=ANCHOR)
            for name, colour, style in zip(members, COLOURS, STYLES, strict=False):
                axis.plot(curves[name]["kl"], curves[name][what], style, color=colour, linewidth=1.3, label=name)
            axis.grid(alpha=0.25)
        axes[0][column].set_title(title, fontsize=10)
        axes[0][column].legend(frameon=False, fontsize=7, loc="lower right")
        axes[1][column].set_xlabel("KL to the start, nats a response")
    axes[0][0].set_ylabel("reward of the front")
    axes[1][0].set_ylabel("its entropy, nats a token")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def page(result: Mapping[str, Any], *, command: str, picture: str) -> str:
    """The page in Markdown; `picture` is its address from there."""
    losses = result["losses"]
    order = sorted(losses, key=lambda name: -(losses[name]["summary"]["share"]["value"] or 0.0))
    kls = result["kls"]
    head = ["loss", "strength by", "share of the best area", *(f"reward at KL {kl:g}" for kl in kls)]
    head += ["against DPO", "entropy at KL " + f"{middle(kls):g}", "accuracy", "furthest KL"]
    rows = [_row(name, losses[name], kls) for name in order]
    claims = [_claim(name, claim) for name in order for claim in losses[name]["claims"]]
    first = "tdpo2" if "tdpo2" in losses else order[0]
    claims.sort(key=lambda row: not row[0].startswith(("`tdpo", f"`{first}")))
    parts = [
        "# Reward against exact KL, for every offline loss",
        _method(result, command),
        EXTRAS,
        f"![Reward and entropy over KL]({picture})",
        _reading(result),
        "## Fronts",
        _table(head, rows),
        "## What the papers say, and what was found",
        CLAIM_NOTES,
        _table(["loss", "the paper's claim", "compared here", "difference at KL " + " / ".join(map("{:g}".format, kls)),
                "found"], claims),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


CLAIM_NOTES = """\
A claim about win rates or accuracy on language is set against the nearest thing that can be asked here: more reward (or
entropy) at equal KL. *shown* means that at one KL or more the paired interval over seeds excludes zero on the claimed
side, and at none on the other; *opposite shown* the reverse. A bold difference is one whose interval excludes zero.
With this many comparisons a few such intervals are to be expected by chance. What is not found here may still hold
where the paper found it: responses of unequal length, edited pairs, instructed models that judge themselves, and
preferences that depend on more than single letters do not exist on this task."""


def _method(result: Mapping[str, Any], command: str) -> str:
    task, start, best = result["task"], result["start"], result["optimum"]
    text = f"""\
Made by `{command}`. The task is KeyTok ({task["letters"]} letters, {task["length"]} a response, hidden worths that flip
with the prompt): each of {len(result["seeds"])} seeds has a chain, worths, {task["pairs"]} pairs and a reference of its
own. The policy is a small residual network over condition, place and previous letter, fitted to the chain
({start["kl_to_chain"]:.4f} nats a response are left) and then trained with each loss at strengths
{", ".join(f"{s:g}" for s in result["strengths"])}: {task["steps"]} steps of {task["batch_size"]} pairs, Adam at
{task["learning_rate"]:g}, the same pairs in the same order for every loss. Nothing but the strength is set per loss:
beta, or what takes its place, is what the column *strength by* says, divided by the strength (times it for orpo, r and
learning rates). Those values were set on another task so that strengths go about as far as DPO's in KL; all else is a
method's default.

Reward, KL(policy ‖ start) and entropy are exact: what such a policy can write is summed, not sampled. The start has
reward {start["reward"]:.2f} and entropy {start["entropy"]:.2f} nats. A loss's front is the best reward within a KL
among its {len(result["strengths"])} strengths, each measured {task["checkpoints"]} times along training; between two
policies of the front it is interpolated in the square root of KL. Its area is the mean of what it gains over the start
for KL from 0 to {result["kl_limit"]:g}; that of the best possible front, known from backward recursion, is
{best["area"]["value"]:.2f}. Intervals are 95% bootstrap intervals over seeds, those of differences paired by seed; **a
difference is called a difference only when the paired interval excludes zero**, and with fewer than
{result["least_seeds"]} seeds nothing is."""
    return "\n\n".join(map(_lines, text.split("\n\n")))


def _lines(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


EXTRAS = """\
What a loss reads besides log-probs is what it was published with, as far as the task has it, and fixed before training
unless said otherwise: TGDPO the implicit rewards of a guide trained with DPO at beta 1; cDPO scores from models of the
chosen and of the rejected responses; AlignDistil DPO and reverse DPO at beta 1; SparsePO mask networks on the
reference's layers, which train beside the policy, or (`+mapo`) its activations; Ra-DPO the CVaR at 0.95, of every
step's policy; BMC the letters that an edit of one response into the other would touch, which are most, since the
responses were drawn apart. T-REG asks an instructed reference to judge; this one knows no instruction, so the guide is
asked after the response's own prompt and after the other. MAPL compares the two prompts of a response, MEET is asked
with its good control."""


def _reading(result: Mapping[str, Any]) -> str:
    checks = result["checks"]
    lines = [
        "The benchmark checks itself: no policy can have more reward less beta times KL than the optimum at that beta, "
        f"and of {checks['policies']} measured ones none exceeds it by more than {max(checks['excess'], 0.0):.1e}"
    ]
    if checks["same_as_dpo"] is not None:
        lines.append(
            "; with responses of one length `ld_dpo` and `dpo_norm` are DPO by another route, and their rewards at "
            f"equal KL differ from DPO's by at most {checks['same_as_dpo']:.1e}"
        )
    not_finite = checks["not_finite"]
    lines.append(f"; {not_finite} policies were not finite." if not_finite else ".")
    return _lines("".join(lines))


def middle(kls: Sequence[float]) -> float:
    """The KL at which entropies are shown."""
    return sorted(kls)[len(kls) // 2]


def _row(name: str, loss: Mapping[str, Any], kls: Sequence[float]) -> list[str]:
    found = loss["summary"]
    cells = [f"`{name}`", loss["strength_by"], _share(found["share"])]
    cells += [_number(found[f"reward@{kl:g}"]) for kl in kls]
    cells += [_against(loss["against_dpo"]), _number(found[f"entropy@{middle(kls):g}"])]
    return [*cells, _number(loss["accuracy"], 3), _number(found["furthest_kl"], 1)]


def _against(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    sides: dict[str, list[str]] = {}
    for key, row in found["at"].items():
        if row["verdict"] != "no difference shown":
            sides.setdefault(row["verdict"], []).append(key.partition("@")[2])
    return "; ".join(f"{side} at {', '.join(kls)}" for side, kls in sides.items()) or found["verdict"]


def _claim(name: str, claim: Mapping[str, Any]) -> list[str]:
    cells = []
    for row in claim["at"].values():
        text = "–" if _missing(row["value"]) else f"{row['value']:+.2f}"
        cells.append(f"**{text}**" if row["verdict"] != "no difference shown" else text)
    what = f"{claim['what']}, against `{claim['against']}`"
    return [f"`{name}`", claim["text"], what, " / ".join(cells), claim["found"]]


def _share(found: Mapping[str, Any]) -> str:
    low, high = found["interval"]
    return "–" if _missing(found["value"]) else f"{found['value']:.3f} [{low:.3f}, {high:.3f}]"


def _number(found: Mapping[str, Any], digits: int = 2) -> str:
    return "–" if _missing(found["value"]) else f"{found['value']:.{digits}f}"


def _missing(value: float | None) -> bool:
    return value is None or not math.isfinite(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
