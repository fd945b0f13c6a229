"""Random inputs of estimators and shapers: one builder an argument name.

Eight rows of three groups that are not neighbours. A method whose arguments all have a name of this table is tested
without further ado; for a new name add one line to `ARGUMENTS`. What the method's meaning exempts it from stands in the
tables below, and the battery fails as well where a method no longer needs its place there.
"""

import inspect
from dataclasses import dataclass, replace

import pytest
import torch
from credit_inputs import Layout, flags, ids, negative, positive

from tokenpo.methods import Method

LENGTHS = (5, 1, 7, 3, 4, 7, 2, 6)
GROUP = (5, -2, 5, -2, 9, 9, 5, -2)
REWARDS = (1.0, 0.0, 0.25, 1.0, -0.5, 1.0, 0.75, 0.0)
PARENT = (-1, -1, 0, 1, -1, 4, 0, 3)
"""Rows as segments of trees, one a group; row 6 is a leaf and no row continues it."""

PLAIN = Layout(lengths=LENGTHS)


def of_rows(values, dtype=None):
    """A builder of a column that is cut or repeated to the rows of the layout."""
    return lambda a: torch.tensor([values[i % len(values)] for i in range(len(a.lengths))], dtype=dtype or a.dtype)


ARGUMENTS = {
    "advantages": lambda a: a.tokens("advantages"),
    "anchor": lambda a: 0.4,
    "answer_ids": of_rows((3, 1, 3, 1, 0, 2, 7, 1), torch.int64),
    "clip_high": lambda a: a.tokens("clip_high", sample=positive),
    "disagreement": lambda a: a.tokens("disagreement", sample=positive),
    "entropy": lambda a: a.tokens("entropy", sample=positive),
    "error_ids": lambda a: a.tokens("error_ids", 4, sample=ids),
    "errors": lambda a: a.tokens("errors", 4),
    "group": of_rows(GROUP, torch.int64),
    "hidden": lambda a: a.tokens("hidden", 3),
    "mask": Layout.mask,
    "old_logps": lambda a: a.tokens("old_logps", sample=negative) / 4,
    "parent": of_rows(PARENT, torch.int64),
    "prefix_values": lambda a: a.prefixes("prefix_values"),
    "ref_rewards": lambda a: a.rows("ref_rewards") / 4,
    "rewards": of_rows(REWARDS),
    "segment_end": lambda a: a.tokens("segment_end", sample=flags),
    "step": lambda a: 40,
    "token_rewards": lambda a: a.tokens("token_rewards"),
    "tokens": lambda a: a.tokens("tokens", sample=ids) % 3,
    "values": lambda a: a.tokens("values", lead=1),
}

EQUAL_REWARDS_SPEAK = {
    "aapo": "the margin over the reference remains",
    "aapo_unscaled": "the margin over the reference remains",
    "copo": "prompts that earn the same differ in consistency",
    "copo_global": "prompts that earn the same differ in consistency",
    "matchtir_advantages": "the token rewards differ",
    "matchtir_released_advantages": "the token rewards differ",
    "ppo_gae": "the critic is the baseline",
    "ppo_gae+": "the critic is the baseline",
    "reinforce_plus_plus+": "the token rewards differ",
    "spo_chain": "the values of prefixes are the baseline",
    "token_rewards_to_go": "the token rewards differ",
    "token_rewards_total": "the token rewards differ",
    "vapo": "the critic is the baseline",
    "vapo+": "the critic is the baseline",
}
"""Estimators for which equal rewards are not zero advantages."""

SINGLES_SPEAK = {
    name: why for name, why in EQUAL_REWARDS_SPEAK.items() if not name.startswith(("token_rewards", "matchtir"))
} | {
    "reinforce_plus_plus": "the batch is the baseline",
    "spo_tree": "the parent is the baseline",
    "spo_tree_scaled": "the parent is the baseline",
}  # fmt: skip
"""Estimators for which a group of one row is not zero: they compare it with something else than its group."""

COLUMNS_MATTER = {"tw_grpo": "columns without a token are positions of the group, as published"}


@dataclass(frozen=True)
class Run:
    """A method, with its optional arguments or without."""

    method: Method
    optional: bool

    @property
    def name(self):
        return self.method.name + ("+" if self.optional else "")

    def arguments(self):
        parameters = inspect.signature(self.method.function).parameters.values()
        positional = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]
        return [p.name for p in positional if self.optional or p.default is p.empty]

    def build(self, layout, **changed):
        inputs = {}
        for name in self.arguments():
            if name not in ARGUMENTS:
                pytest.fail(f"method '{self.method.name}' takes '{name}': add it to ARGUMENTS in {__name__}.py")
            inputs[name] = ARGUMENTS[name](layout)
        return inputs | {name: value for name, value in changed.items() if name in inputs}

    def __call__(self, layout=PLAIN, **changed):
        return self.method.function(**self.build(layout, **changed))


def runs(methods):
    """Each method, and once more with optional arguments if it has any."""
    found = []
    for method in methods.values():
        parameters = inspect.signature(method.function).parameters.values()
        optional = any(p.kind is not p.KEYWORD_ONLY and p.default is not p.empty for p in parameters)
        found += [Run(method, False)] + [Run(method, True)] * optional
    return found


def reorder(inputs, order):
    """The inputs for the rows in another order, or for some of them; `parent` names rows and is renamed."""
    place = torch.full((int(order.max()) + 1,), -1).scatter(0, order, torch.arange(len(order)))
    place = torch.cat([place, torch.full((64,), -1)])
    moved = {name: x[order] if isinstance(x, torch.Tensor) and x.dim() else x for name, x in inputs.items()}
    if "parent" in moved:
        moved["parent"] = torch.where(moved["parent"] < 0, -1, place[moved["parent"]])
    return moved


def padded(layout=PLAIN, **changed):
    return replace(layout, **changed)
