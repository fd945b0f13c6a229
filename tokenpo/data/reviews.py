"""The embedded corpus: short reviews from a small grammar, whose true reward is a sum of word worths.

Because the reward is additive over words, the credit of every token is known exactly. Preferences are
drawn from the Bradley-Terry model, `P(first preferred) = sigmoid((r_first - r_second) / TAU)`, so the best
accuracy any predictor can reach on a set of pairs is known too (`bayes_rate`). Standard library only.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from tokenpo.errors import InputError

T = TypeVar("T")

TAU = 0.64
EMBEDDED = Path(__file__).parent / "embedded"
SEEDS = {"train": 1, "test": 2}
SIZES = {"train": 8192, "test": 1000}

# Words by the place they can take in a sentence, each followed by its worth.
LEXICON_TEXT = {
    "overall": """superb 2 wonderful 2 excellent 1.75 splendid 1.75 great 1.5 lovely 1.25 pleasant 1 good 1
        nice 0.75 solid 0.75 decent 0.5 fine 0.5 average -0.25 odd -0.5 mediocre -0.75 weak -0.75 poor -1
        bad -1 disappointing -1.25 unpleasant -1.25 miserable -1.75 awful -1.75 dreadful -2 terrible -2""",
    "story": """thrilling 1.75 gripping 1.75 moving 1.5 touching 1.25 clever 1.25 witty 1.25 inventive 1
        elegant 1 lively 0.75 subtle 0.5 silly -0.5 predictable -0.75 flat -0.75 clumsy -1 shallow -1
        confusing -1 dull -1.25 tedious -1.5 boring -1.5 lifeless -1.5""",
    "person": """brilliant 2 charming 1.5 gifted 1.5 friendly 1.25 graceful 1.25 kind 1.25 warm 1 cheerful 1
        polite 0.75 patient 0.75 impatient -0.75 cold -1 grumpy -1 wooden -1.25 careless -1.25 sloppy -1.25
        lazy -1.25 arrogant -1.5 rude -1.75 hostile -1.75""",
    "food": """heavenly 2 delicious 1.75 tasty 1.25 wholesome 1 fresh 1 flavourful 1 generous 0.75 rich 0.75
        fragrant 0.75 crisp 0.5 salty -0.5 bitter -0.75 watery -0.75 greasy -1 soggy -1 bland -1 stale -1.25
        burnt -1.25 tasteless -1.5 revolting -2""",
    "place": """stunning 2 spotless 1.5 comfortable 1.25 cosy 1.25 peaceful 1 spacious 1 elegant 1 bright 0.75
        tidy 0.75 quiet 0.5 draughty -0.75 noisy -1 cramped -1 damp -1 gloomy -1 ugly -1.25 shabby -1.25
        dingy -1.25 dirty -1.5 filthy -2""",
    "verb": """loved 2 adored 2 enjoyed 1.25 admired 1.25 praised 1 liked 1 appreciated 0.75 disliked -1
        endured -1 regretted -1.25 resented -1.5 despised -2 loathed -2 hated -2""",
    "noun": """triumph 2 delight 1.75 joy 1.5 gem 1.5 marvel 1.5 pleasure 1.25 success 1.25 treat 1.25
        bargain 0.75 muddle -0.75 chore -1 bore -1.25 letdown -1.25 failure -1.5 mess -1.5 shambles -1.5
        nightmare -2 disaster -2""",
    "adverb": """flawlessly 1.75 brilliantly 1.75 beautifully 1.5 skilfully 1.25 smoothly 0.75 nicely 0.75
        capably 0.5 slowly -0.5 poorly -1 carelessly -1 badly -1 rudely -1.5 terribly -1.75 horribly -2""",
}


def _parse(text: str) -> dict[str, float]:
    fields = text.split()
    return {word: float(worth) for word, worth in zip(fields[::2], fields[1::2], strict=True)}


LEXICON: dict[str, dict[str, float]] = {place: _parse(text) for place, text in LEXICON_TEXT.items()}
WORTHS: dict[str, float] = {word: worth for words in LEXICON.values() for word, worth in words.items()}

# Which adjectives an aspect takes; every aspect takes the "overall" ones too.
KINDS = {
    "story": "plot dialogue ending writing music design".split(),
    "person": "cast hero singer band staff waiter guide driver".split(),
    "food": "soup fish dessert wine breakfast coffee cake lunch".split(),
    "place": "room lobby hall garden shop stage bus terrace".split(),
}
ADJECTIVES: dict[str, list[str]] = {
    aspect: [*LEXICON[kind], *LEXICON["overall"]] for kind, aspects in KINDS.items() for aspect in aspects
}
# The reviewed thing: its aspects | two neutral sentences that only fit this thing.
THINGS_TEXT = """
film: plot cast dialogue music ending | We saw it at the old cinema. | It runs for just over two hours.
book: plot hero dialogue writing ending | I read it on the train home. | It has almost four hundred pages.
play: plot cast dialogue stage ending | We sat near the back that night. | It has two acts and one break.
concert: singer band music hall stage | We stood by the door all night. | They played for almost two hours.
hotel: room lobby staff breakfast garden | We stayed for three nights in May. | It is right behind the station.
meal: soup fish dessert wine waiter | We had a table near the window. | We ordered three courses and some water.
museum: guide hall garden shop design | We walked through all of its floors. | It opens at nine in the morning.
game: plot hero music design ending | I played it for about two weeks. | It runs on my old computer too.
cafe: coffee cake staff terrace room | I stopped there on my way home. | It is on the corner by the park.
tour: guide bus driver lunch garden | We left the harbour just before nine. | It covers most of the old town.
"""
OPENINGS = ("Review of the {}:\n", "A review of the {}:\n", "My thoughts on the {}:\n")
# Slots: {a}, {b} two aspects, {qa}, {qb} an adjective for each, {person} an aspect that is a person.
SENTENCES = (
    "The {a} was {qa} and the {b} {qb}.",
    "I found the {a} {qa}, the {b} {qb}.",
    "Its {qa} {a} and {qb} {b} stood out.",
    "The {person} worked {adverb}, the {b} was {qb}.",
    "The {a} seemed {qa} to me this time.",
    "I {verb} the {a} from the very beginning.",
    "My {who} {verb} the {a} on {day}.",
    "The {thing} was a {noun} for my {who}.",
    "In short, this {thing} is a {noun}.",
    "All told, it felt {overall} to me.",
    "My {who} told me about it on {day}.",
)
FILLERS = {
    "who": "sister brother mother father friend neighbour".split(),
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    **{place: list(LEXICON[place]) for place in ("verb", "noun", "adverb", "overall")},
}
LENGTHS = (2, 3, 4)
WORD = re.compile(r"[A-Za-z]+")
SLOT = re.compile(r"{(\w+)}")


def _parse_things() -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    aspects, own_sentences = {}, {}
    for line in THINGS_TEXT.strip().splitlines():
        head, *sentences = line.split(" | ")
        thing, _, names = head.partition(": ")
        aspects[thing], own_sentences[thing] = names.split(), sentences
    return aspects, own_sentences


ASPECTS, OWN_SENTENCES = _parse_things()


class Dice:
    """Uniform choices from a seeded stream; `nats` adds up -log of their probabilities.

    Only `Random.random` is used: its stream is the one Python promises to keep between versions.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.nats = 0.0

    def pick(self, options: Sequence[T]) -> T:
        """One of `options`, each equally likely."""
        self.nats += math.log(len(options))
        return options[int(self.rng.random() * len(options))]


def _fill(template: str, thing: str, dice: Dice) -> str:
    """`template` with its slots filled for `thing`."""
    filled = {"thing": thing}

    def aspect(slot: str) -> str:
        if slot not in filled:
            free = [name for name in ASPECTS[thing] if name not in filled.values()]
            if slot == "person":
                free = [name for name in free if name in KINDS["person"]]
            filled[slot] = dice.pick(free)
        return filled[slot]

    def value(match: re.Match) -> str:
        slot = match[1]
        if slot in ("qa", "qb"):
            return dice.pick(ADJECTIVES[aspect(slot[1])])
        if slot in ("a", "b", "person"):
            return aspect(slot)
        return thing if slot == "thing" else dice.pick(FILLERS[slot])

    return SLOT.sub(value, template)


def draw_review(rng: random.Random, thing: str) -> tuple[str, float]:
    """A review of `thing` (2 to 4 different sentences, 12 to 32 words) and its surprisal in nats.

    The surprisal is -log of the probability of the choices made. A text can come from one set of choices only,
    so the mean over draws is the entropy of the grammar: the fewest nats a language model can reach here.
    """
    if thing not in ASPECTS:
        raise InputError(f"no review grammar for the thing {thing!r}: choose from {', '.join(ASPECTS)}")
    dice = Dice(rng)
    templates = [*SENTENCES, *OWN_SENTENCES[thing]]
    sentences = []
    for _ in range(dice.pick(LENGTHS)):
        template = dice.pick(templates)
        templates.remove(template)
        sentences.append(_fill(template, thing, dice))
    return " ".join(sentences), dice.nats


def prompts() -> list[str]:
    """Every prompt of the corpus; a prompt ends with a newline, a review starts right after it."""
    return [opening.format(thing) for thing in ASPECTS for opening in OPENINGS]


def prompt_thing(prompt: str) -> str:
    """The thing that a prompt of `prompts()` asks about."""
    words = [word for word in WORD.findall(prompt) if word in ASPECTS]
    if len(words) != 1:
        raise InputError(f"prompt {prompt!r} names no known thing, or several: take one from reviews.prompts()")
    return words[0]


def _word_worths(text: str) -> list[tuple[int, float]]:
    """(index of the word's last character, worth) of every word of known worth."""
    found = ((match.end() - 1, WORTHS.get(match[0].lower(), 0.0)) for match in WORD.finditer(text))
    return [(last, worth) for last, worth in found if worth]


def true_reward(text: str) -> float:
    """The sum of the worths of the words in `text`; words outside the lexicon are worth 0."""
    return math.fsum(worth for _, worth in _word_worths(text))


def token_credit(text: str, spans: Iterable[tuple[int, int]]) -> list[float]:
    """The true credit of every token of `text`: its words' worths, so that the credits sum to the reward.

    `spans`: `(start, end)` characters of each token in `text`, in order, without overlap. A word's worth
    falls on the token that holds the word's last character: the first moment at which the word is certain.
    Tokens without characters (`<eos>`, an empty span) get 0, and so do all earlier pieces of a word.
    """
    worths = _word_worths(text)
    return [math.fsum(worth for last, worth in worths if start <= last < end) for start, end in spans]


def sum_by_word(
    text: str, spans: Iterable[tuple[int, int]], values: Iterable[float], *, worths: Mapping[str, float] = WORTHS
) -> list[tuple[str, float, float]]:
    """(word, its worth, sum of `values` over its tokens) for every word of `text`, in order.

    Any credit, one value a token, beside the truth. A model is often certain of a word before its last piece
    and puts the credit there, so words compare more fairly than tokens. A token belongs to the word that holds
    its last character; `spans` as in `token_credit`. `worths` by word in lower case; others are worth 0.
    """
    words = list(WORD.finditer(text))
    sums = [0.0] * len(words)
    owner = {i: index for index, word in enumerate(words) for i in range(*word.span())}
    for (start, end), value in zip(spans, values, strict=True):
        if start < end and end - 1 in owner:
            sums[owner[end - 1]] += value
    return [(word[0], worths.get(word[0].lower(), 0.0), total) for word, total in zip(words, sums, strict=True)]


def corrected(text: str, rng: random.Random) -> str:
    """`text` with every word of negative worth replaced by one of positive worth that fits its place, and nothing else.

    What an annotator who edits as little as possible would hand back: pairs (corrected, text) have exact edit labels.
    """
    return _turned(text, rng, -1)


def spoiled(text: str, rng: random.Random) -> str:
    """The mirror of `corrected`: every word of positive worth gives way to one of negative worth."""
    return _turned(text, rng, 1)


def _turned(text: str, rng: random.Random, sign: int) -> str:
    """Words whose worth has that sign replaced by ones of the other sign that may stand in their place."""

    def other(match: re.Match[str]) -> str:
        word = match[0].lower()
        if sign * WORTHS.get(word, 0.0) <= 0:
            return match[0]
        fitting = [w for words in LEXICON.values() if word in words for w, worth in words.items() if sign * worth < 0]
        alike = [w for w in fitting if (w[0] in "aeiou") == (word[0] in "aeiou")] or fitting  # "a" and "an" stay right
        found = alike[int(rng.random() * len(alike))]
        return found.capitalize() if match[0][0].isupper() else found

    return WORD.sub(other, text)


def preference_probability(first: float, second: float, tau: float = TAU) -> float:
    """Bradley-Terry: `sigmoid((first - second) / tau)` for two true rewards."""
    return 0.5 * (1.0 + math.tanh((first - second) / (2.0 * tau)))  # tanh cannot overflow


def draw_pair(rng: random.Random) -> dict[str, str]:
    """One preference pair: `prompt`, and two independent draws of the grammar as `chosen` and `rejected`."""
    known = prompts()
    prompt = known[int(rng.random() * len(known))]
    first, second = (draw_review(rng, prompt_thing(prompt))[0] for _ in range(2))
    if rng.random() >= preference_probability(true_reward(first), true_reward(second)):
        first, second = second, first
    return {"prompt": prompt, "chosen": first, "rejected": second}


def draw_pairs(count: int, seed: int) -> list[dict[str, str]]:
    """The first `count` preference pairs of the stream `seed`."""
    rng = random.Random(seed)
    return [draw_pair(rng) for _ in range(count)]


def bayes_rate(pairs: Iterable[Mapping[str, str]], tau: float = TAU) -> float:
    """The expected accuracy of the best possible predictor on these pairs: mean of `sigmoid(|r_c - r_r| / tau)`."""
    gaps = [abs(true_reward(pair["chosen"]) - true_reward(pair["rejected"])) for pair in pairs]
    if not gaps:
        raise InputError("bayes_rate needs at least one pair, got none")
    return math.fsum(preference_probability(gap, 0.0, tau) for gap in gaps) / len(gaps)


def embedded_model_path() -> Path:
    """Folder of the shipped model and tokenizer, for `AutoModelForCausalLM.from_pretrained`."""
    return EMBEDDED / "model"


def embedded_pairs(split: str) -> list[dict[str, str]]:
    """The shipped pairs of `split` ("train" or "test"): columns prompt, chosen, rejected."""
    if split not in SIZES:
        raise InputError(f"the embedded data has no split {split!r}: choose from {', '.join(SIZES)}")
    lines = (EMBEDDED / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
