"""Random inputs of every registered loss that is not pairwise: a builder a kind, or a method where one kind differs."""

import dataclasses
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenpo.credit.edits import ADDED, DELETED, NOT_COUNTED, SUBSTITUTED, UNCHANGED
from tokenpo.credit.segments import OUTSIDE, segment_ends
from tokenpo.methods import Method
from tokenpo.types import TokenStats

LENGTHS = {"chosen": (5, 1, 7, 3), "rejected": (2, 6, 1, 7), "prompt": (3, 1, 4, 2)}
VOCABULARY = 5


@dataclass(frozen=True)
class Layout:
    """Which rows, padded how, with what under the mask; row r holds the same tokens in every layout."""

    rows: tuple[int, ...] = (0, 1, 2, 3)
    left: int = 0
    right: int = 0
    garbage: float = 0.0
    dtype: torch.dtype = torch.float64
    without_tokens: bool = False

    def lengths(self, side: str) -> list[int]:
        return [0 if self.without_tokens else LENGTHS[side][r] for r in self.rows]

    def mask(self, side: str) -> Tensor:
        lengths = self.lengths(side)
        places = torch.arange(self.left + max(lengths, default=0) + self.right) - self.left
        ends = torch.tensor(lengths, dtype=torch.int64).unsqueeze(-1)
        return (places >= 0) & (places < ends)

    def flat(self, side: str, name: str, *shape: int) -> Tensor:
        """(N, *shape) standard normal values of the tokens of a side, row after row."""
        drawn = [draw(f"{side}/{name}/{r}", n, *shape) for r, n in zip(self.rows, self.lengths(side), strict=True)] or [
            torch.zeros(0, *shape, dtype=torch.float64)
        ]
        return torch.cat(drawn).to(self.dtype)

    def place(self, side: str, tokens: Tensor, fill: float) -> Tensor:
        """(B, T, ...) with the values of `flat` at the tokens and `fill` elsewhere."""
        mask = self.mask(side)
        out = tokens.new_full((*mask.shape, *tokens.shape[1:]), fill)
        out[mask] = tokens
        return out

    def values(self, side: str, name: str, *shape: int) -> Tensor:
        return self.place(side, self.flat(side, name, *shape), self.garbage)

    def stats(self, side: str) -> TokenStats:
        logps, ref_logps = (self.place(side, -self.flat(side, n).abs() - 0.1, self.garbage) for n in ("logps", "ref"))
        return TokenStats(mask=self.mask(side), logps=logps, ref_logps=ref_logps)

    def a_row(self, values: list[Any]) -> Tensor:
        """(B,) of one value a row."""
        chosen = torch.tensor(values)[list(self.rows)]
        return chosen.to(self.dtype) if chosen.is_floating_point() else chosen


def draw(name: str, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """Arguments of a loss, by name.

    `leaves`: what learns, "argument" or "argument.field", each with the (B, T) mask of the tokens that it speaks of,
    or None where it holds counted tokens only. `counts`: how many of each unit, as the whole batch would be counted.
    """

    inputs: dict[str, Any]
    leaves: dict[str, Tensor | None]
    counts: dict[str, int]

    def leaf(self, path: str) -> Tensor:
        name, _, field = path.partition(".")
        return getattr(self.inputs[name], field) if field else self.inputs[name]

    def replace(self, leaves: dict[str, Tensor]) -> "Case":
        inputs = dict(self.inputs)
        for path, value in leaves.items():
            name, _, field = path.partition(".")
            inputs[name] = dataclasses.replace(inputs[name], **{field: value}) if field else value
        return dataclasses.replace(self, inputs=inputs)

    def map(self, f: Callable[[Tensor], Tensor]) -> "Case":
        """`f` of every floating-point tensor."""

        def of(value: Any) -> Any:
            if isinstance(value, TokenStats):
                return TokenStats(**{name: of(tensor) for name, tensor in value.tensors().items()})
            return f(value) if isinstance(value, Tensor) and value.is_floating_point() else value

        return dataclasses.replace(self, inputs={name: of(value) for name, value in self.inputs.items()})


def tokens_of(layout: Layout, *sides: str) -> int:
    return sum(sum(layout.lengths(side)) for side in sides)


def of_sides(layout: Layout, names: dict[str, str], counts: dict[str, int], **others: Tensor) -> Case:
    """A case whose arguments are the statistics of sides, argument -> side, and others that do not learn."""
    inputs = {name: layout.stats(side) for name, side in names.items()}
    return Case({**inputs, **others}, {f"{name}.logps": stats.mask for name, stats in inputs.items()}, counts)


def supervised(layout: Layout) -> Case:
    case = of_sides(
        layout, {"chosen": "chosen", "rejected": "rejected"}, {"chosen_tokens": tokens_of(layout, "chosen")}
    )
    return dataclasses.replace(case, leaves={"chosen.logps": case.inputs["chosen"].mask})


def controlled_pairs(layout: Layout) -> Case:
    counts = {"tokens": tokens_of(layout, "chosen", "rejected")}
    return of_sides(layout, {"chosen": "chosen", "rejected": "rejected"}, counts)


def unpaired(layout: Layout) -> Case:
    """The KL is an estimate of the whole batch: every part of it gets the same."""
    return of_sides(
        layout, {"stats": "chosen"}, {"rows": len(layout.rows)},
        desirable=layout.a_row([True, False, False, True]), kl=torch.tensor(0.3, dtype=layout.dtype),
    )  # fmt: skip


def prompt_pairs(layout: Layout) -> Case:
    of_rejected = layout.a_row([True, False, False, False])
    n = int(of_rejected.sum())
    counts = {"pairs_of_chosen": len(layout.rows) - n, "pairs_of_rejected": n}
    return of_sides(layout, {"better": "chosen", "worse": "rejected"}, counts, of_rejected=of_rejected)


def pairwise_with_prompt(layout: Layout) -> Case:
    counts = {"pairs": len(layout.rows), "prompt_and_chosen_tokens": tokens_of(layout, "prompt", "chosen")}
    return of_sides(layout, {name: name for name in ("chosen", "rejected", "prompt")}, counts)


def distillation(*teachers: str) -> Callable[[Layout], Case]:
    def build(layout: Layout) -> Case:
        logits = {name: layout.flat("chosen", name, VOCABULARY) for name in ("logits", *teachers)}
        return Case({**logits, "mask": layout.mask("chosen")}, {"logits": None}, {"rows": len(layout.rows)})

    return build


def segment_preference(layout: Layout) -> Case:
    """Segments of two tokens; what is read is the value at their ends, so garbage stands everywhere else."""
    inputs, leaves = {"margin": layout.a_row([0.1, 0.0, -0.2, 0.3])}, {}
    for side in ("chosen", "rejected"):
        ids = torch.cat([torch.arange(n) // 2 for n in (*layout.lengths(side), 0)])
        segments = layout.place(side, ids, OUTSIDE)
        values = layout.values(side, "values")
        inputs |= {
            f"{side}_values": torch.where(segment_ends(segments), values, layout.garbage),
            f"{side}_segments": segments,
        }
        leaves[f"{side}_values"] = layout.mask(side)
    return Case(inputs, leaves, {"pairs": len(layout.rows)})


def token_classes(layout: Layout) -> Case:
    inputs, leaves = {}, {}
    for name, side, changed in (("edited", "chosen", ADDED), ("original", "rejected", DELETED)):
        operations = torch.tensor([UNCHANGED, SUBSTITUTED, changed])
        which = layout.flat(side, "operations").double().abs().mul(2).long().clamp(max=2)
        inputs |= {
            f"{name}_logits": layout.values(side, "logits", 2),
            f"{name}_operations": layout.place(side, operations[which], NOT_COUNTED),
        }
        leaves[f"{name}_logits"] = layout.mask(side)
    return Case(inputs, leaves, {"pairs": len(layout.rows)})


def implicit_prm(layout: Layout) -> Case:
    outcomes = layout.a_row([1.0, 0.0, 0.25, 1.0])
    return of_sides(layout, {"stats": "chosen"}, {"rows": len(layout.rows)}, outcomes=outcomes)


def critic(layout: Layout) -> Case:
    inputs = {name: layout.values("chosen", name) for name in ("values", "old_values", "returns")}
    mask = layout.mask("chosen")
    return Case({**inputs, "mask": mask}, {"values": mask}, {"tokens": tokens_of(layout, "chosen")})


def outcomes(layout: Layout) -> Case:
    correct = layout.a_row([True, False, True, True])
    lengths = torch.tensor(layout.lengths("chosen"), dtype=torch.int64)
    counts = {"correct_tokens": int(lengths[correct].sum())}
    return of_sides(layout, {"stats": "chosen"}, counts, correct=correct)


def head_at_the_end(layout: Layout) -> Case:
    """Only the value at the last token is read, so garbage stands at all others too."""
    inputs, leaves = {"margin": layout.a_row([0.1, 0.0, -0.2, 0.3])}, {}
    for side in ("chosen", "rejected"):
        mask = layout.mask(side)
        last = mask & ~torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)
        inputs |= {
            f"{side}_values": torch.where(last, layout.values(side, "values"), layout.garbage),
            f"{side}_mask": mask,
        }
        leaves[f"{side}_values"] = mask
    return Case(inputs, leaves, {"pairs": len(layout.rows)})


def roll_outs(wanted: list[Any], *classes: int) -> Callable[[Layout], Case]:
    def build(layout: Layout) -> Case:
        mask, logits = layout.mask("chosen"), layout.values("chosen", "logits", *classes)
        inputs = {"logits": logits, "outcomes": layout.a_row(wanted), "mask": mask}
        return Case(inputs, {"logits": mask}, {"rows": len(layout.rows)})

    return build


def labelled_tokens(layout: Layout) -> Case:
    """Every token but each second one of a row has a label."""
    classes = layout.flat("chosen", "labels").double().abs().mul(2).long().clamp(max=2)
    counted = torch.cat([torch.arange(n) % 2 == 0 for n in (*layout.lengths("chosen"), 0)])
    labels = layout.place("chosen", torch.where(counted, classes, -1), -1)
    inputs = {"logits": layout.values("chosen", "logits", 3), "labels": labels}
    return Case(inputs, {"logits": layout.mask("chosen")}, {"rows": len(layout.rows)})


BUILDERS: dict[str, Callable[[Layout], Case]] = {
    "supervised": supervised,
    "controlled_pairs": controlled_pairs,
    "unpaired": unpaired,
    "prompt_pairs": prompt_pairs,
    "pairwise_with_prompt": pairwise_with_prompt,
    "aligndistil": distillation("dpo_logits", "rdpo_logits"),
    "aligndistil_constant": distillation("dpo_logits", "rdpo_logits"),
    "aligndistil_theorem1": distillation("dpo_logits", "ref_logits"),
    "segment_preference": segment_preference,
    "token_class": token_classes,
    "changed_token_class": token_classes,
    "implicit_prm": implicit_prm,
    "bradley_terry": head_at_the_end,
    "outcome_classes": roll_outs([1, 0, 2, 1], 3),
    "outcome_binary": roll_outs([1.0, 0.0, 0.0, 1.0]),
    "labelled_tokens": labelled_tokens,
    "value": critic,
    "outcome": outcomes,
}


def build(method: Method, layout: Layout, requires_grad: bool = True) -> Case:
    """Inputs of a loss; the leaves want a gradient."""
    known = [BUILDERS[key] for key in (method.name, method.kind) if key in BUILDERS]
    if not known:
        raise AssertionError(f"no inputs for '{method.name}' of kind '{method.kind}': add a builder to loss_inputs.py")
    case = known[0](layout)
    if requires_grad:
        for path in case.leaves:
            case.leaf(path).requires_grad_()
    return case
