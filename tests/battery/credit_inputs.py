"""Random inputs of credit functions: one builder an argument name.

A credit function whose arguments all have a name of this table is tested without further ado. For a new name add
one line to `ARGUMENTS`; where one method means something else by a known name, add `(method, argument)` to
`EXCEPTIONS`; where the reward of a row is not the argument `rewards`, say what it is in `REWARD_OF`.
"""

import inspect
import zlib
from dataclasses import dataclass

import pytest
import torch

PROMPT, HEADS, VOCABULARY = 3, 2, 5


@dataclass(frozen=True)
class Layout:
    """Rows of `lengths` tokens, and where their columns lie.

    `left`, `right`, `hole`: columns that do not count, before all tokens, after them, and between the second and the
    third. `garbage` stands at every entry that does not count. Two layouts of the same lengths hold the same values.
    `kept`: tokens 0..kept of every row as always, what comes after them drawn anew: another future.
    """

    lengths: tuple[int, ...] = (5, 1, 7, 3)
    left: int = 0
    right: int = 0
    hole: int = 0
    garbage: float = 0.0
    dtype: torch.dtype = torch.float64
    kept: int | None = None

    @property
    def width(self):
        return self.left + max(self.lengths, default=0) + self.hole + self.right

    def column(self, token):
        return self.left + token + (self.hole if token >= 2 else 0)

    def draw(self, name, count, *shape, sample=torch.randn, lead=0):
        """(B, count, *shape): entry i tells of tokens 0..i - lead, and changes where one of those is not kept."""
        size = (len(self.lengths), count, *shape)
        draws = []
        for version in ("", "another future"):
            g = torch.Generator().manual_seed(zlib.crc32((name + version).encode()))
            draws.append(torch.stack([sample(size[1:], generator=g) for _ in self.lengths]) if self.lengths else None)
        if draws[0] is None:
            return sample(size)
        if self.kept is None:
            return draws[0]
        kept = torch.arange(count) <= self.kept + lead
        return torch.where(kept.reshape(1, -1, *[1] * len(shape)), *draws)

    def empty(self, like, *shape):
        """Garbage of the kind of `like`."""
        size = (len(self.lengths), *shape)
        if like.dtype == torch.bool:
            return torch.full(size, bool(self.garbage), dtype=torch.bool)
        if not like.is_floating_point():
            return torch.full(size, -999_983 if self.garbage else 0, dtype=like.dtype)
        return torch.full(size, self.garbage, dtype=self.dtype)

    def mask(self):
        mask = torch.zeros(len(self.lengths), self.width, dtype=torch.bool)
        for row, n in enumerate(self.lengths):
            mask[row, [self.column(i) for i in range(n)]] = True
        return mask

    def tokens(self, name, *shape, sample=torch.randn, lead=0):
        """(B, T, *shape): a value a token, that tells of the response through it (`lead=1`: before it)."""
        drawn = self.draw(name, max(self.lengths, default=0), *shape, sample=sample, lead=lead)
        placed = self.empty(drawn, self.width, *shape)
        for row, n in enumerate(self.lengths):
            for i in range(n):
                placed[row, self.column(i)] = drawn[row, i].to(placed.dtype)
        return placed

    def prefixes(self, name):
        """(B, T+1): a value before the first token, in its column, and one through each token, a column later."""
        drawn = self.draw(name, max(self.lengths, default=0) + 1, lead=1)
        placed = self.empty(drawn, self.width + 1)
        for row, n in enumerate(self.lengths):
            placed[row, self.column(0)] = drawn[row, 0].to(self.dtype)
            for i in range(n):
                placed[row, self.column(i) + 1] = drawn[row, i + 1].to(self.dtype)
        return placed

    def rows(self, name, *shape, sample=torch.randn):
        """(B, *shape): known at the end of the response only."""
        drawn = self.draw(name, 1, *shape, sample=sample, lead=-max(self.lengths, default=0) - 1)[:, 0]
        return drawn.to(self.dtype) if drawn.is_floating_point() else drawn


def negative(size, generator=None):
    return -torch.rand(size, generator=generator, dtype=torch.float64) - 0.05


def positive(size, generator=None):
    return torch.rand(size, generator=generator, dtype=torch.float64) * 4 + 0.05


def ids(size, generator=None):
    return torch.randint(VOCABULARY, size, generator=generator)


def flags(size, generator=None):
    return torch.rand(size, generator=generator) < 0.3


def positions(layout):
    """Token i of every row sits at PROMPT + i on the axis that attention counts."""
    placed = layout.empty(torch.zeros((), dtype=torch.int64), layout.width)
    for row, n in enumerate(layout.lengths):
        for i in range(n):
            placed[row, layout.column(i)] = PROMPT + i
    return placed


def attentions(layout):
    """(B, H, S, S), causal, without padding; garbage right of the diagonal and behind the response."""
    longest = max(layout.lengths, default=0)
    size = PROMPT + longest
    drawn = layout.draw("attentions", longest + 1, HEADS, size, sample=positive)
    placed = layout.empty(drawn, HEADS, size, size)
    for row, n in enumerate(layout.lengths):
        for i in range(n):
            seen = PROMPT + i + 1
            placed[row, :, seen - 1, :seen] = drawn[row, i, :, :seen].to(layout.dtype)
    return placed


def step_attentions(layout):
    """(B, H, T, S): the step that emits token i sees the prompt and tokens before i."""
    longest = max(layout.lengths, default=0)
    drawn = layout.draw("step_attentions", longest, HEADS, PROMPT + longest, sample=positive)
    placed = layout.empty(drawn, HEADS, layout.width, PROMPT + longest)
    for row, n in enumerate(layout.lengths):
        for i in range(n):
            placed[row, :, layout.column(i), : PROMPT + i] = drawn[row, i, :, : PROMPT + i].to(layout.dtype)
    return placed


def token_offsets(layout):
    """Token i covers characters 4 i to 4 i + 3."""
    placed = layout.empty(torch.zeros((), dtype=torch.int64), layout.width, 2)
    for row, n in enumerate(layout.lengths):
        for i in range(n):
            placed[row, layout.column(i)] = torch.tensor([4 * i, 4 * i + 3])
    return placed


def spans(layout):
    def sample(size, generator=None):
        start = torch.randint(20, (*size[:-1], 1), generator=generator)
        length = torch.randint(1, 12, (*size[:-1], 1), generator=generator)
        return torch.cat([start, start + length, torch.randint(-1, 3, start.shape, generator=generator)], -1)

    return layout.rows("spans", 4, 3, sample=sample)


def turn_rewards(layout):
    """(B, 3): one a run of the mask, garbage behind them."""
    drawn = layout.rows("turn_rewards", 3)
    runs = [0 if n == 0 else 2 if layout.hole and n > 2 else 1 for n in layout.lengths]
    for row, n in enumerate(runs):
        drawn[row, n:] = layout.garbage
    return drawn


ARGUMENTS = {
    "mask": Layout.mask,
    "activations": lambda a: {"mlp": [a.tokens("mlp", 3)], "resid": [a.tokens("r0", 3), a.tokens("r1", 3)]},
    "attentions": attentions,
    "better_logps": lambda a: a.tokens("better_logps", sample=negative),
    "confidence": lambda a: a.rows("confidence", 4, sample=lambda size, generator=None: torch.rand(
        size, generator=generator, dtype=torch.float64)),
    "cost_prefix_values": lambda a: a.prefixes("cost_prefix_values"),
    "dpo_logps": lambda a: a.tokens("dpo_logps", sample=negative),
    "entropy": lambda a: a.tokens("entropy", sample=positive),
    "is_edited": lambda a: torch.arange(len(a.lengths)) % 2 == 0,
    "lime": lambda a: a.tokens("lime"),
    "logits": lambda a: a.tokens("logits", 2),
    "logps": lambda a: a.tokens("logps", sample=negative),
    "negative_logits": lambda a: a.tokens("negative_logits", VOCABULARY),
    "old_logps": lambda a: a.tokens("old_logps", sample=negative),
    "other_mask": lambda a: torch.arange(6) < a.rows("other_lengths", sample=ids).unsqueeze(-1) + 2,
    "other_tokens": lambda a: a.rows("other_tokens", 6, sample=ids),
    "positions": positions,
    "positive_logits": lambda a: a.tokens("positive_logits", VOCABULARY),
    "potentials": lambda a: a.tokens("potentials", lead=1),
    "prefix_values": lambda a: a.prefixes("prefix_values"),
    "ref_kl": lambda a: a.tokens("ref_kl", sample=positive),
    "ref_logps": lambda a: a.tokens("ref_logps", sample=negative),
    "rewards": lambda a: a.rows("rewards"),
    "rm_values": lambda a: a.tokens("rm_values"),
    "segment_end": lambda a: a.tokens("segment_end", sample=flags),
    "shapley": lambda a: a.tokens("shapley"),
    "spans": spans,
    "step_attentions": step_attentions,
    "token_offsets": token_offsets,
    "token_rewards": lambda a: a.tokens("token_rewards"),
    "tokens": lambda a: a.tokens("tokens", sample=ids),
    "turn_rewards": turn_rewards,
    "values": lambda a: a.tokens("values", lead=1),
    "worse_logps": lambda a: a.tokens("worse_logps", sample=negative),
}  # fmt: skip

EXCEPTIONS = {}

REWARD_OF = {
    "matchtir": lambda inputs: inputs["turn_rewards"][:, 0],
    "red_full": lambda inputs: inputs["prefix_values"].gather(-1, inputs["mask"].sum(-1, keepdim=True)).squeeze(-1),
}
"""Of the layout without holes or padding: what the row's reward is, from the inputs."""

RUNS_MATTER = {"matchtir"}
"""Methods for which columns that do not count, inside a response, mean something: they part turns."""


def build(method, layout):
    """The inputs of a method, by argument name, or a failure that says what to add here."""
    names = [p.name for p in inspect.signature(method.function).parameters.values() if p.kind is not p.KEYWORD_ONLY]
    inputs = {}
    for name in names:
        builder = EXCEPTIONS.get((method.name, name), ARGUMENTS.get(name))
        if builder is None:
            pytest.fail(f"credit method '{method.name}' takes '{name}': add it to ARGUMENTS in {__name__}.py")
        inputs[name] = builder(layout)
    return inputs


def reward_of(method, inputs):
    """(B,) what the token rewards of each row are to sum to, or None where no input says."""
    if method.name in REWARD_OF:
        return REWARD_OF[method.name](inputs)
    return inputs.get("rewards")


def map_tensors(f, x):
    if isinstance(x, torch.Tensor):
        return f(x)
    if isinstance(x, dict):
        return {name: map_tensors(f, value) for name, value in x.items()}
    return [map_tensors(f, value) for value in x]


def tensors_of(x):
    found = []
    map_tensors(found.append, x)
    return found
