"""Credit sources that take more than one registered function, or read what no other source reads.

Each is a function (reader, *, settings) -> (2P, T) token rewards or weights of one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from tokenpo import credit
from tokenpo.commands.reader import Job, Reader, batches, language_model, reward_model
from tokenpo.errors import InputError
from tokenpo.methods import Finite, Fraction, NonNegative, Positive, Range

Count = Annotated[int, Range(0)]


def implicit(reader: Reader, *, beta: Positive | None = None) -> Tensor:
    """beta * (guide - reference log-probs); beta left out: the loss's."""
    beta = _beta(reader, beta)
    return credit.implicit_rewards(reader("logps"), reader("ref_logps"), reader("mask"), beta=beta)


def _beta(reader: Reader, beta: float | None) -> float:
    """That of the loss, which trains the guide too, unless another is given."""
    return reader.job.beta if beta is None else beta


def prime(reader: Reader, *, beta: Positive | None = None) -> Tensor:
    """Process rewards of an implicit reward model, one trained on outcomes or with DPO; beta that of its training."""
    beta = _beta(reader, beta)
    return credit.prime_rewards(reader("logps"), reader("ref_logps"), reader("mask"), beta=beta)


def prime_whole(reader: Reader, *, beta: Positive | None = None) -> Tensor:
    """`prime` summed onto the last token."""
    beta = _beta(reader, beta)
    return credit.prime_whole_rewards(reader("logps"), reader("ref_logps"), reader("mask"), beta=beta)


def prime_returns(
    reader: Reader,
    *,
    beta: Positive | None = None,
    process_gamma: Fraction = 1.0,
    outcome_gamma: Fraction = 1.0,
    process_weight: NonNegative = 1.0,
    outcome_weight: NonNegative = 1.0,
) -> Tensor:
    """PRIME's returns, the two responses of a pair being the group; not scaled by the batch, which has no meaning."""
    return credit.prime_returns(
        prime(reader, beta=beta),
        reader("rewards"),
        reader("group"),
        reader("mask"),
        process_gamma=process_gamma,
        outcome_gamma=outcome_gamma,
        process_weight=process_weight,
        outcome_weight=outcome_weight,
    )


def prime_released_returns(
    reader: Reader,
    *,
    beta: Positive | None = None,
    process_gamma: Fraction = 1.0,
    outcome_gamma: Fraction = 1.0,
    process_weight: NonNegative = 1.0,
    outcome_weight: NonNegative = 1.0,
) -> Tensor:
    """`prime_returns` with the authors' process baseline."""
    return credit.released_prime_returns(
        prime(reader, beta=beta),
        reader("rewards"),
        reader("group"),
        reader("mask"),
        process_gamma=process_gamma,
        outcome_gamma=outcome_gamma,
        process_weight=process_weight,
        outcome_weight=outcome_weight,
    )


def bellman(reader: Reader, *, beta: Positive | None = None) -> Tensor:
    """Rewards that make the guide optimal, its values from raw logits; beta left out: the loss's."""
    beta = _beta(reader, beta)
    values = beta * reader("log_partition")
    return credit.bellman_rewards(reader("logps"), reader("ref_logps"), values, reader("mask"), beta=beta)


def expected_implicit(reader: Reader, *, beta: Positive | None = None) -> Tensor:
    """-beta * KL(reference || guide) at each position; beta left out: the loss's."""
    beta = _beta(reader, beta)
    return credit.expected_implicit_rewards(reader("ref_kl"), reader("mask"), beta=beta)


def gae(reader: Reader, *, gamma: Fraction = 1.0, lam: Fraction = 0.95) -> Tensor:
    """Advantages of the sequence reward at the last token against a value model."""
    return credit.gae(reader("token_rewards"), reader("values"), reader("mask"), gamma=gamma, lam=lam)[0]


def rto_segment(
    reader: Reader,
    *,
    dpo_coef: NonNegative = 0.05,
    kl_coef: NonNegative = 0.01,
    reward_coef: NonNegative = 1.0,
    ends: str = ".!?\n",
) -> Tensor:
    """RTO paid at the tokens that hold a character of `ends`."""
    mask = reader("mask")
    texts = [row[f"{side}_text"] for side in ("chosen", "rejected") for row in reader.rows]
    places = reader("token_offsets").tolist()
    marks = [[any(c in ends for c in text[a:b]) for a, b in row] for text, row in zip(texts, places, strict=True)]
    return credit.rto_segment_rewards(
        reader("old_logps"),
        reader("ref_logps"),
        reader("dpo_logps"),
        reader("rewards"),
        mask,
        mask & torch.tensor(marks),
        dpo_coef=dpo_coef,
        kl_coef=kl_coef,
        reward_coef=reward_coef,
    )


def modified_tokens(reader: Reader, *, ignore: Sequence[str] = (), autojunk: bool = False) -> Tensor:
    """1 at tokens that differ between the responses of a pair, else 0; the words of `ignore` are never marked."""
    encode = reader.job.tokenizer
    ids = [i for word in ignore for i in encode(word, add_special_tokens=False)["input_ids"]]
    pairs = len(reader.rows)
    tokens, mask = reader("tokens"), reader("mask")
    sides = (tokens[:pairs], tokens[pairs:], mask[:pairs], mask[pairs:])
    return torch.cat(credit.modified_tokens(*sides, ignore=ids, autojunk=autojunk))


def contrastive_prompt(
    reader: Reader, *, better_template: str | None = None, worse_template: str | None = None
) -> Tensor:
    """The starting model (or the one named) scores each response after a request to improve and to degrade it."""
    from tokenpo.data.prompt_variants import BETTER_TEMPLATE, WORSE_TEMPLATE, contrastive_prompts
    from tokenpo.evaluation import as_batch, render_prompt
    from tokenpo.statistics import response_stats

    templates = {
        "better_template": better_template or BETTER_TEMPLATE,
        "worse_template": worse_template or WORSE_TEMPLATE,
    }
    model = language_model(reader.job, "model")
    pairs = [(row, side) for side in ("chosen", "rejected") for row in reader.rows]
    prompts = [contrastive_prompts(row["prompt"], row[side], **templates) for row, side in pairs]
    responses = [row[f"{side}_ids"] for row, side in pairs]
    scored = []
    for way in (0, 1):
        ids = [render_prompt(both[way], reader.job.tokenizer) for both in prompts]
        with torch.no_grad():
            scored.append(response_stats(model, as_batch(ids, responses, model.device)).logps.cpu())
    return credit.contrastive_prompt_rewards(scored[0], scored[1], reader("mask"))


def contrastive_scores(reader: Reader, *, contrast: NonNegative = 1.0) -> Tensor:
    """1 - s on rejected tokens, s low where a model of good answers and one of bad answers part; 1 on chosen ones.

    The two models are those named, or are trained first on the chosen and on the rejected responses.
    """
    from tokenpo.statistics import LinearHead, at_responses, hidden_before_head

    pairs, mask = len(reader.rows), reader("mask")
    counted, rows, heads = mask[pairs:], [], []
    with torch.no_grad():
        for key in ("positive", "negative"):
            model = language_model(reader.job, key)
            batch = {name: value[pairs:] for name, value in reader.on(model).items()}
            states = at_responses(hidden_before_head(model, batch), batch).cpu()
            rows.append(states[counted[:, : states.shape[1]]])
            heads.append(LinearHead.of(model))
        scores = []
        # logits of a few rows at a time: (P, T, vocabulary) of two models is gigabytes
        for *part, taken in zip(*(x.split(256) for x in (*rows, reader("tokens")[pairs:][counted])), strict=True):
            good, bad = (h.logits(x.to(h.weight.device))[None] for h, x in zip(heads, part, strict=True))
            ids = taken[None].to(good.device)
            scores.append(credit.contrastive_scores(good, bad, ids, torch.ones_like(ids).bool(), beta=contrast)[0])
    rejected = torch.ones(counted.shape).masked_scatter(counted, 1.0 - torch.cat(scores).cpu())
    return torch.cat([torch.ones(pairs, mask.shape[1]), rejected])


NORMALISER = ("w_mean", "w_std", "b_mean", "b_std")


def segment_reward(
    reader: Reader,
    *,
    threshold: NonNegative | None = None,
    w_mean: Finite | None = None,
    w_std: Finite | None = None,
    b_mean: Finite | None = None,
    b_std: Finite | None = None,
    least_std: Positive | None = 0.1,
    fit_pairs: Count = 2000,
) -> Tensor:
    """Segment rewards. What is left out is what a reward model trained on segments says of itself.

    For another one `threshold` is 2 nats, of the model that training starts from or of `credit.reference`, and the
    normaliser is fitted to the first `fit_pairs` training pairs; 0 normalises nothing. `least_std` is 0.1 here: a
    fitted line may cross zero.
    """
    reading = reward_model(reader.job, "model").reading
    if threshold is None:
        threshold = reading.threshold
    given = {"w_mean": w_mean, "w_std": w_std, "b_mean": b_mean, "b_std": b_std}
    numbers = {name: value for name, value in given.items() if value is not None}
    if not numbers and reading.normaliser is not None:
        numbers = reading.normaliser._asdict()
    if not numbers and fit_pairs:
        numbers = reader.job.keep("normaliser", lambda: fit_normaliser(reader.job, threshold, fit_pairs))
    values, entropy = _values_and_entropy(reader)
    return credit.segment_rewards(values, entropy, reader("mask"), threshold=threshold, least_std=least_std, **numbers)


def _values_and_entropy(reader: Reader) -> tuple[Tensor, Tensor]:
    """(2P, T) each: the head at every token, and the entropy that cuts segments."""
    model = reward_model(reader.job, "model")
    with torch.no_grad():
        outputs = model(reader.on(model))
    own = outputs.entropy if "reference" not in reader.job.folders else None
    return outputs.scalars[:, 1:].float().cpu(), reader("entropy") if own is None else own.float().cpu()


def fit_normaliser(job: Job, threshold: float, pairs: int) -> dict[str, float]:
    """The location-aware normaliser of the reward model at `threshold`."""
    from tokenpo.reward_models import fit_location_normaliser

    values, index, count = [], [], []
    for reader in batches(job, pairs):
        head, entropy = _values_and_entropy(reader)
        segments = credit.entropy_segments(entropy, reader("mask"), threshold=threshold)
        ends = credit.segment_ends(segments)
        values.append(head[ends])
        index.append(segments[ends])
        count.append(ends.sum(-1, keepdim=True).expand(ends.shape)[ends])
    try:
        return fit_location_normaliser(torch.cat(values), torch.cat(index), torch.cat(count))._asdict()
    except InputError as reason:
        raise InputError(
            f"credit 'segment_reward': {reason}; lower credit.threshold, give {', '.join(NORMALISER)}, or fit_pairs=0"
        ) from reason


def reading(reader: Reader) -> Tensor:
    """What every token earned by a reward model of tokenpo, as its own reading has it."""
    model = reward_model(reader.job, "model")
    return model.token_rewards(reader.on(model)).float().cpu()
