"""Explanations of a reward model as a credit source: Shapley values and LIME over the tokens of each response.

A token that a coalition leaves out is deleted; the reward of what is left is the model's at its last token.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from tokenpo import credit
from tokenpo.commands.inputs import padded
from tokenpo.commands.reader import Job, Reader, batches, reward_model
from tokenpo.credit.attribution import EXACT_LIMIT, Score
from tokenpo.errors import InputError
from tokenpo.methods import AtLeastOne, Fraction, NonNegative, Positive, Range

Count = Annotated[int, Range(0)]

ROWS = 256
"""Coalitions a forward of the reward model takes."""

HELD_OUT = 32
"""Coalitions a response that shape weights are learned against."""


def explainable_dense(
    reader: Reader,
    *,
    shapley_weight: Fraction = 0.5,
    lime_weight: Fraction = 0.0,
    exact_tokens: Annotated[int, Range(0, EXACT_LIMIT)] = 8,
    permutations: AtLeastOne = 4,
    lime_samples: AtLeastOne = 64,
    sigma: Positive = 0.25,
    ridge: NonNegative = 1.0,
    explainer: Literal["own", "captum"] = "own",
    trials: Count = 0,
    learn_pairs: AtLeastOne = 16,
) -> Tensor:
    """(2P, T) the reward model's score of each response, spread by a blend of its explanations.

    Responses of up to `exact_tokens` tokens get exact Shapley values, 2^n scores each; longer ones are estimated
    over `permutations` random orders, n + 1 scores each, by tokenpo or by Captum. `lime_samples` coalitions for LIME.
    A part of weight 0 is not computed. `trials` above 0: the weights are learned by `learned_weights` from the first
    `learn_pairs` training pairs, in the place of those given.
    """
    settings = {
        "exact_tokens": exact_tokens,
        "permutations": permutations,
        "lime_samples": lime_samples,
        "sigma": sigma,
        "ridge": ridge,
        "explainer": explainer,
    }
    job = reader.job
    if trials:
        learned = job.keep("shape_weights", lambda: learned_weights(job, trials, learn_pairs, settings))
        shapley_weight, lime_weight = learned["shapley_weight"], learned["lime_weight"]
    values = reader("prefix_values")
    whole = values.gather(1, reader.batch["response_lengths"].unsqueeze(-1)).squeeze(-1)
    shapley, lime = _attributions(reader, settings, shapley_weight > 0, lime_weight > 0)
    return credit.explainable_rewards(
        whole, shapley, lime, reader("mask"), shapley_weight=shapley_weight, lime_weight=lime_weight
    )


def learned_weights(job: Job, trials: int, pairs: int, settings: dict[str, Any]) -> dict[str, float]:
    """The shape weights whose token rewards best predict the reward model on coalitions that no explainer saw.

    The score of a trial is the correlation, within responses, of a held-out coalition's reward with the sum of its
    tokens' rewards. The paper's is that of a policy after a whole run: for it, call
    `tokenpo.credit.search_shape_weights` with a run as the objective. Needs Optuna.
    """
    cases = []
    for reader in batches(job, pairs):
        mask = reader("mask")
        shapley, lime = _attributions(reader, settings, True, True)
        shapes = [credit.softmax_shape(shapley, mask), credit.softmax_shape(lime, mask), credit.last_token_shape(mask)]
        values = reader("prefix_values").gather(1, reader.batch["response_lengths"].unsqueeze(-1)).squeeze(-1)
        for b, n in enumerate(reader.batch["response_lengths"].tolist()):
            kept = credit.random_coalitions(n, HELD_OUT, generator=_generator(reader, b, "held out"))[1:]
            wanted = coalition_score(reader, b)(kept).double()
            parts = torch.stack([shape[b, :n].double() for shape in shapes]) * values[b].double()
            predicted = kept.double() @ parts.T
            cases.append((predicted - predicted.mean(0), wanted - wanted.mean()))
    predicted, wanted = (torch.cat(parts) for parts in zip(*cases, strict=True))

    def objective(weights: Tensor) -> float:
        guess = predicted @ weights
        size = guess.norm() * wanted.norm()
        return float(guess @ wanted / size) if size > 0 else 0.0

    weights, score = credit.search_shape_weights(objective, 3, trials=trials, seed=job.config.seed)
    names = ("shapley_weight", "lime_weight", "last_weight")
    return {**dict(zip(names, weights.clamp(0.0, 1.0).tolist(), strict=True)), "correlation": score}


def _attributions(reader: Reader, settings: dict[str, Any], shapley: bool, lime: bool) -> tuple[Tensor, Tensor]:
    """(2P, T) each; zeros for the one that is not wanted."""
    shapleys: list[list[float]] = []
    limes: list[list[float]] = []
    for b, n in enumerate(reader.batch["response_lengths"].tolist()):
        score = coalition_score(reader, b)
        shapleys.append(_shapley(score, n, reader, b, settings).tolist() if shapley else [])
        limes.append(_lime(score, n, reader, b, settings).tolist() if lime else [])
    width = reader("mask").shape[1]
    return padded(shapleys, width), padded(limes, width)


def _shapley(score: Score, n: int, reader: Reader, b: int, settings: dict[str, Any]) -> Tensor:
    if n <= settings["exact_tokens"]:
        return credit.exact_shapley(score(credit.all_coalitions(n)))
    generator = _generator(reader, b, "shapley")
    if settings["explainer"] == "captum":
        return captum_shapley(score, n, permutations=settings["permutations"], seed=generator.initial_seed())
    return credit.sampled_shapley(score, n, permutations=settings["permutations"], generator=generator)


def captum_shapley(score: Score, n: int, *, permutations: int, seed: int) -> Tensor:
    """(n,) `tokenpo.credit.sampled_shapley` by Captum's ShapleyValueSampling."""
    try:
        from captum.attr import ShapleyValueSampling
    except ImportError as error:
        raise InputError("credit.explainer=captum needs Captum: pip install captum, or take explainer=own") from error
    explainer = ShapleyValueSampling(lambda kept: score(kept > 0.5))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = explainer.attribute(torch.ones(1, n), baselines=torch.zeros(1, n), n_samples=permutations)
    return found[0]


def _lime(score: Score, n: int, reader: Reader, b: int, settings: dict[str, Any]) -> Tensor:
    kept = credit.random_coalitions(n, settings["lime_samples"], generator=_generator(reader, b, "lime"))
    kernel = credit.lime_kernel(kept, sigma=settings["sigma"])
    return credit.lime_attribution(kept, score(kept), kernel, ridge=settings["ridge"])[0]


def coalition_score(reader: Reader, b: int) -> Score:
    """The reward of each coalition of the tokens of row b, the prompt kept; none kept: the value of the prompt."""
    model = reward_model(reader.job, "model")
    start, n = int(reader.batch["prompt_lengths"][b]), int(reader.batch["response_lengths"][b])
    prompt, response = reader.batch["input_ids"][b, :start], reader.batch["input_ids"][b, start : start + n]

    def values(kept: Tensor) -> Tensor:
        rows = [torch.cat([prompt, response[row]]) for row in kept]
        lengths = kept.sum(-1)
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        batch = {
            "input_ids": ids,
            "attention_mask": (torch.arange(ids.shape[1]) < (start + lengths).unsqueeze(-1)).long(),
            "prompt_lengths": torch.full_like(lengths, start),
            "response_lengths": lengths,
        }
        found = model.prefix_values({name: value.to(model.device) for name, value in batch.items()}).float().cpu()
        return found.gather(1, lengths.unsqueeze(-1)).squeeze(-1)

    def score(kept: Tensor) -> Tensor:
        distinct, place = torch.unique(kept, dim=0, return_inverse=True)
        return torch.cat([values(part) for part in distinct.split(ROWS)])[place]

    return score


def _generator(reader: Reader, b: int, purpose: str) -> torch.Generator:
    """Of a row's own, so that the size of batches changes nothing."""
    import zlib

    row = reader.rows[b % len(reader.rows)]["row"]
    label = f"{reader.job.config.seed} {purpose} {row} {b // len(reader.rows)}"
    return torch.Generator().manual_seed(zlib.crc32(label.encode()))
