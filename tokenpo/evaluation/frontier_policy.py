"""A policy so small that the reward, KL and entropy of everything it can write are sums, not estimates from samples.

It writes the letters of `tokenpo.data.tasks.KeyTok`. What it says next depends on the prompt's condition, the place and
the letter before, as with the chain that the data come from and with the optimum. So all it can say is one table: a row
of logits for each of S = 2 * length * (letters + 1) states (condition, place, previous letter; the last "letter" stands
for the start of the response).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenpo.statistics.dense import dense_rows

INITIAL_STD = 0.2
GOOD, BAD = 0, 1
"""Rows of `LetterPolicy.control`, for methods that train one prompt after a good and after a bad control."""


class Measured(NamedTuple):
    """A policy in the plane: KL(policy || reference) of whole responses, mean reward, mean entropy a token; nats."""

    kl: float
    reward: float
    entropy: float


@dataclass(frozen=True)
class States:
    """How states are numbered: ((condition * length + place) * (letters + 1) + previous)."""

    letters: int
    length: int

    @property
    def count(self) -> int:
        return 2 * self.length * (self.letters + 1)

    def of(self, conditions: Tensor, tokens: Tensor) -> Tensor:
        """(B, T) the state each token is drawn in; `conditions` (B,) in {0, 1}, `tokens` (B, T) letters."""
        first = torch.full_like(tokens[:, :1], self.letters)
        previous = torch.cat([first, tokens[:, :-1]], 1)
        places = conditions[:, None] * self.length + torch.arange(self.length)
        return places * (self.letters + 1) + previous

    def table(self, rows: Tensor) -> Tensor:
        """(2, T, K + 1, ...) view of (S, ...)."""
        return rows.unflatten(0, (2, self.length, self.letters + 1))


class Said(NamedTuple):
    """One forward over all states: `logits` (S, K); the stream after each layer and the units within it, (S, H)."""

    logits: Tensor
    layers: list[Tensor]
    units: list[Tensor]


class LetterPolicy(nn.Module):
    """Embeddings of condition, place and previous letter, added, then residual layers and a head over letters.

    `control`: embeddings of two controls before the prompt (GOOD, BAD), for methods that train them. `prompt`: logits
    of the two conditions, the policy's likelihood of prompts, for the loss that counts it. Both start at zero.
    """

    def __init__(self, states: States, *, width: int = 48, layers: int = 2) -> None:
        super().__init__()
        self.states = states
        self.condition, self.place, self.previous = (
            nn.Parameter(INITIAL_STD * torch.randn(size, width)) for size in (2, states.length, states.letters + 1)
        )
        self.control = nn.Parameter(torch.zeros(2, width))
        self.prompt = nn.Parameter(torch.zeros(2))
        self.before = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.up = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, states.letters, bias=False)

    def forward(self, control: int | None = None) -> Said:
        """All states at once, after a control (GOOD, BAD) or after none."""
        x = self.condition[:, None, None] + self.place[:, None] + self.previous
        x = (x if control is None else x + self.control[control]).flatten(0, 2)
        layers, units = [], []
        for before, up, down in zip(self.before, self.up, self.down, strict=True):
            units.append(F.gelu(up(before(x))))
            x = x + down(units[-1])
            layers.append(x)
        layers[-1] = self.norm(x)
        return Said(self.head(layers[-1]), layers, units)


@torch.no_grad()
def measure(logits: Tensor, ref_logits: Tensor, worths: Tensor, states: States) -> Measured:
    """Exact, in float64: both conditions equally often, every response the policy can write by its probability.

    `logits`, `ref_logits` (S, K); `worths` (2, K) of a letter under each condition. KL is KL(policy || reference) of
    whole responses, reward the expected sum of worths, entropy the mean over places of the expected entropy.
    """
    log_p, log_q = (x.double().log_softmax(-1) for x in (logits, ref_logits))
    rows = dense_rows(log_p, log_q, _no_tokens(log_p), ("policy_kl", "entropy"))
    kls, entropies, p = (states.table(x) for x in (rows["policy_kl"], rows["entropy"], log_p.exp()))
    kl = reward = entropy = torch.zeros((), dtype=torch.float64)
    for place, mass in enumerate(_masses(p)):
        kl = kl + (mass * kls[:, place]).sum() / 2
        entropy = entropy + (mass * entropies[:, place]).sum() / (2 * states.length)
        reward = reward + (torch.einsum("cs,csk->ck", mass, p[:, place]) * worths).sum() / 2
    return Measured(max(float(kl), 0.0), float(reward), float(entropy))


def visited(probabilities: Tensor, states: States) -> Tensor:
    """(S,) how often a response passes each state, both conditions equally often; sums to `length`."""
    return torch.stack(_masses(states.table(probabilities)), 1).flatten() / 2


def _masses(p: Tensor) -> list[Tensor]:
    """(2, K + 1) chance of each previous letter at each place, of (2, T, K + 1, K) probabilities."""
    start = p.new_zeros(2, p.shape[2])
    start[:, -1] = 1.0
    masses = [start]
    for place in range(p.shape[1] - 1):
        letters = torch.einsum("cs,csk->ck", masses[-1], p[:, place])
        masses.append(F.pad(letters, (0, 1)))
    return masses


def pick(values: Tensor, states: Tensor) -> Tensor:
    """(B, T) of (S,)."""
    return values.index_select(0, states.flatten()).view(states.shape)


def taken(log_probs: Tensor, states: Tensor, tokens: Tensor) -> Tensor:
    """(B, T) of (S, K): the log-prob of each token in its state."""
    return pick(log_probs.flatten(), states * log_probs.shape[1] + tokens)


def _no_tokens(rows: Tensor) -> Tensor:
    return torch.zeros(len(rows), dtype=torch.long)


@torch.no_grad()
def best_logits(ref_logits: Tensor, worths: Tensor, states: States, beta: float) -> Tensor:
    """(S, K) log-probs of the policy that maximises E[reward] - beta * KL(policy || reference), by backward recursion.

    V[t, s] = beta * log sum_k q(k | s) exp((worth_k + V[t + 1, k]) / beta), policy = q * exp((worth + V' - V) / beta).
    """
    log_q = states.table(ref_logits.double().log_softmax(-1))
    after = worths.new_zeros(2, states.letters)
    rows: list[Tensor] = []
    for place in reversed(range(states.length)):
        tilted = log_q[:, place] + ((worths + after) / beta)[:, None]
        value = tilted.logsumexp(-1, keepdim=True)
        rows.insert(0, tilted - value)
        after = beta * value[:, :-1, 0]
    return torch.stack(rows, 1).flatten(0, 2)


def best_front(ref_logits: Tensor, worths: Tensor, states: States, betas: Sequence[float]) -> list[Measured]:
    """The optimum at each beta: no policy has more reward at the KL of one of these."""
    found = [best_logits(ref_logits, worths, states, beta) for beta in betas]
    return [measure(logits, ref_logits, worths, states) for logits in found]


def fit(policy: LetterPolicy, chain: Tensor, *, steps: int, learning_rate: float) -> float:
    """Supervised start: least KL(chain || policy) of whole responses, in place; returns what is left of it, nats.

    `chain` (S, K) probabilities. Every state counts as often as the chain visits it: the fit to endless data.
    """
    weights, log_chain = visited(chain, policy.states), chain.clamp(min=1e-12).log()
    optimizer = torch.optim.Adam(policy.parameters(), lr=learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        divergence(chain, log_chain, policy().logits, weights).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return float(divergence(chain, log_chain, policy().logits, weights))


def divergence(chain: Tensor, log_chain: Tensor, logits: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum over states of KL(chain || softmax(logits))."""
    return (weights * (chain * (log_chain - logits.log_softmax(-1))).sum(-1)).sum()
