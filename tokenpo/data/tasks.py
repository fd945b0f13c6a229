"""Two synthetic tasks whose true token credit is known exactly: KeyTok and SlipChain.

KeyTok (needs numpy): letters of a Markov chain, each worth +1, 0 or -1; the score is their sum, and the
exact KL-regularised optimum follows from dynamic programming. SlipChain (standard library): a chain of
digits that slips now and then; the exact advantage of every token follows from a closed-form value.
Both speak in single characters, so that a character's index in the text is its token's index.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

from tokenpo.errors import InputError

SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")
SLIPCHAIN_FILLERS = "abcdefgh"
SLIPCHAIN_CHARACTERS = "0123456789.:" + SLIPCHAIN_FILLERS
ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def vocabulary(characters: str) -> dict[str, int]:
    """Token -> id: `<pad>` 0, `<bos>` 1, `<eos>` 2, `<unk>` 3, then one id per character in order."""
    if len(set(characters)) != len(characters):
        raise InputError(f"vocabulary needs distinct characters, got {characters!r}")
    return {token: index for index, token in enumerate((*SPECIALS, *characters))}


def character_tokenizer(characters: str) -> Any:
    """A fast Hugging Face tokenizer with one token per character of `characters` and nothing added around.

    Join `tokenizer.bos_token + prompt + response + tokenizer.eos_token` yourself. Needs transformers.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel(vocabulary(characters), unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **names)


@dataclass(frozen=True)
class SlipChain:
    """A chain of digits with slips. Prompt `d1..d2..:`, response `s1 F s2 F ... sn F`.

    `operation` "copy": s_k = d_k, so a slip spoils its own step only; reward 1 if every step is right.
    `operation` "sum": s_k = (s_{k-1} + d_k) mod `base`, so a slip is carried on; reward 1 if s_n is right.
    A slip (probability `slip_rate` a step) puts a uniformly drawn wrong digit. Each digit is followed by
    `filler` letters, each uniform over `filler_kinds` letters: log(filler_kinds) nats and no credit. Prompt
    and response have the same stride, so a model finds each digit at a constant distance.
    """

    steps: int = 8
    base: int = 5
    operation: str = "sum"
    slip_rate: float = 0.15
    filler: int = 1
    filler_kinds: int = 8

    def __post_init__(self) -> None:
        if self.operation not in ("copy", "sum"):
            raise InputError(f"SlipChain.operation must be 'copy' or 'sum', got {self.operation!r}")
        if not 2 <= self.base <= 10:
            raise InputError(f"SlipChain.base must be 2 to 10 (one character a digit), got {self.base}")
        if not 1 <= self.filler_kinds <= len(SLIPCHAIN_FILLERS):
            raise InputError(f"SlipChain.filler_kinds must be 1 to 8, got {self.filler_kinds}")

    @property
    def characters(self) -> str:
        """Every character that a prompt or response can hold."""
        return SLIPCHAIN_CHARACTERS

    @property
    def stride(self) -> int:
        """Characters from one digit to the next."""
        return 1 + self.filler

    def draw_prompt(self, rng: random.Random) -> tuple[list[int], str]:
        """The digits of a problem and its prompt text."""
        digits = [rng.randrange(self.base) for _ in range(self.steps)]
        return digits, "".join(str(digit) + "." * self.filler for digit in digits) + ":"

    def draw_response(self, digits: list[int], rng: random.Random) -> str:
        """A response with its slips."""
        previous, parts = 0, []
        for digit in digits:
            step = self._right_step(previous, digit)
            if rng.random() < self.slip_rate:
                step = (step + rng.randrange(1, self.base)) % self.base
            fillers = (SLIPCHAIN_FILLERS[rng.randrange(self.filler_kinds)] for _ in range(self.filler))
            parts.append(str(step) + "".join(fillers))
            previous = step
        return "".join(parts)

    def _right_step(self, previous: int, digit: int) -> int:
        return (previous + digit) % self.base if self.operation == "sum" else digit

    def read_steps(self, response: str) -> list[int] | None:
        """The digits of `response`; None if its length or a digit's place is wrong; fillers are free."""
        if len(response) != self.stride * self.steps:
            return None
        marks = response[:: self.stride]
        return [int(mark) for mark in marks] if all(mark in "0123456789" for mark in marks) else None

    def reward(self, digits: list[int], response: str) -> float:
        """1.0 for a right response, 0.0 for a wrong or malformed one."""
        steps = self.read_steps(response)
        if steps is None:
            return 0.0
        right = steps[-1] == sum(digits) % self.base if self.operation == "sum" else steps == list(digits)
        return float(right)

    def value(self, right_so_far: bool, left: int) -> float:
        """P(reward = 1) of this sampler with `left` steps to come.

        `right_so_far`: the running sum is right ("sum"), no slip yet ("copy"). For "sum" a wrong state mends
        by a second slip, and lambda = 1 - base * slip_rate / (base - 1) is the chain's second eigenvalue.
        """
        if self.operation == "copy":
            return float(right_so_far) * (1.0 - self.slip_rate) ** left
        base = self.base
        decay = (1.0 - base * self.slip_rate / (base - 1)) ** left
        return 1.0 / base + (1.0 - 1.0 / base) * decay if right_so_far else (1.0 - decay) / base

    def credit(self, digits: list[int], response: str) -> tuple[list[float], list[int]] | None:
        """(advantages, slips) per character; None for a malformed response.

        The advantage is V after the character minus V before it: 0 at fillers, and the advantages sum to
        `reward - value(True, steps)`. `slips` is 1 at a digit that does not follow from the one before.
        """
        steps = self.read_steps(response)
        if steps is None:
            return None
        advantages, slips = [0.0] * len(response), [0] * len(response)
        right, previous, truth = True, 0, 0
        for index, (digit, step) in enumerate(zip(digits, steps, strict=True)):
            before = self.value(right, self.steps - index)
            truth = self._right_step(truth, digit)
            right = step == truth and (right or self.operation == "sum")
            slips[index * self.stride] = int(step != self._right_step(previous, digit))
            advantages[index * self.stride] = self.value(right, self.steps - index - 1) - before
            previous = step
        return advantages, slips


class KeyTok:
    """Letters with hidden worths. Prompt "A:" or "B:", response `length` letters of a fixed Markov chain.

    `positive` letters are worth +1 and as many -1; under "B" every sign flips. The score is the sum of
    worths, and P(first preferred) = sigmoid((score1 - score2) / tau). Key letters are as frequent as
    others, so surprisal and entropy say nothing about them. `seed` fixes chain and worths.
    Streams are numpy `Generator`s. A letter is its index in `letters`, a response a list of indices.
    """

    def __init__(
        self,
        letter_count: int = 24,
        length: int = 16,
        tau: float = 1.0,
        concentration: float = 0.5,
        positive: int = 4,
        seed: int = 0,
    ) -> None:
        import numpy as np

        if not 2 * positive <= letter_count <= len(ALPHABET):
            raise InputError(f"KeyTok.letter_count must be {2 * positive} to 26, got {letter_count}")
        rng = np.random.default_rng(seed)
        self.length, self.tau = length, tau
        self.letters = ALPHABET[:letter_count]
        self.start = np.full(letter_count, 1 / letter_count)
        drawn = rng.dirichlet(np.full(letter_count, concentration), size=letter_count)
        self.transitions = 0.7 * drawn + 0.3 / letter_count  # every letter can follow every other
        order = rng.permutation(letter_count)
        self.worths = np.zeros(letter_count)
        self.worths[order[:positive]] = 1.0
        self.worths[order[positive : 2 * positive]] = -1.0
        self._cumulative = np.vstack([self.start, self.transitions]).cumsum(axis=1)
        self._optima: dict[tuple[str, float], tuple] = {}

    @property
    def characters(self) -> str:
        """Every character that a prompt or response can hold."""
        return "AB:" + self.letters

    def sign(self, condition: str) -> float:
        """+1 under "A", -1 under "B"."""
        if condition not in ("A", "B"):
            raise InputError(f"KeyTok condition must be 'A' or 'B', got {condition!r}")
        return 1.0 if condition == "A" else -1.0

    def prompt(self, condition: str) -> str:
        """Prompt text of a condition."""
        return condition + ":"

    def text(self, response: list[int]) -> str:
        """Response text."""
        return "".join(self.letters[index] for index in response)

    def draw_response(self, rng: Any) -> list[int]:
        """One response of the chain; one uniform number a letter."""
        response: list[int] = []
        for uniform in rng.random(self.length):
            row = self._cumulative[response[-1] + 1 if response else 0]
            response.append(min(int(row.searchsorted(uniform)), len(self.letters) - 1))
        return response

    def draw_pair(self, rng: Any) -> tuple[str, list[int], list[int]]:
        """(condition, chosen, rejected)."""
        condition = "A" if rng.random() < 0.5 else "B"
        first, second = self.draw_response(rng), self.draw_response(rng)
        gap = (self.score(condition, first) - self.score(condition, second)) / self.tau
        first_wins = rng.random() < 0.5 * (1.0 + math.tanh(0.5 * gap))
        return (condition, first, second) if first_wins else (condition, second, first)

    def token_worths(self, condition: str, response: list[int]) -> list[float]:
        """The worth of each letter under `condition`."""
        return [self.sign(condition) * float(self.worths[index]) for index in response]

    def score(self, condition: str, response: list[int]) -> float:
        """The sum of the letters' worths."""
        return math.fsum(self.token_worths(condition, response))

    def optimum(self, condition: str, beta: float) -> tuple:
        """Soft-optimal Q (T, K, K) and V (T, K) arrays of `max E[score] - beta KL(policy || chain)`.

        Q[t, previous, letter] = worth(letter) + V[t+1, letter] and
        V[t, previous] = beta log sum_letter p(letter | previous) exp(Q / beta), with V[T] = 0. At t = 0 there
        is no previous letter and all rows are equal.
        """
        import numpy as np

        if (condition, beta) in self._optima:
            return self._optima[condition, beta]
        worths = self.sign(condition) * self.worths
        count = len(self.letters)
        q, v = np.empty((self.length, count, count)), np.zeros((self.length + 1, count))
        for t in reversed(range(self.length)):
            q[t] = worths + v[t + 1]
            chain = self.transitions if t else np.tile(self.start, (count, 1))
            v[t] = beta * np.log((chain * np.exp(q[t] / beta)).sum(axis=1))
        self._optima[condition, beta] = q, v[:-1]
        return q, v[:-1]

    def soft_advantages(self, condition: str, response: list[int], beta: float) -> list[float]:
        """A_t = Q_t - V_t along `response`: the exact token credit of the optimum, in reward units.

        beta log(optimum / chain) of the letter, so the advantages sum to `score - V_0`, and the difference of
        the sums of two responses is the difference of their scores.
        """
        q, v = self.optimum(condition, beta)
        pairs = zip([0, *response[:-1]], response, strict=True)
        return [float(q[t, previous, letter] - v[t, previous]) for t, (previous, letter) in enumerate(pairs)]
