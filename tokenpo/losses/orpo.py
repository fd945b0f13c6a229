"""ORPO: likelihood of the chosen response plus a log odds ratio between the two, without a reference."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tokenpo import masked
from tokenpo.errors import InputError
from tokenpo.losses.pairwise import logistic, pairwise_loss
from tokenpo.methods import Positive, method
from tokenpo.types import LossOutput, TokenStats

TITLE = "ORPO: Monolithic Preference Optimization without Reference Model"
PAPER = "https://arxiv.org/abs/2403.07691"


def log_odds(mean_logps: Tensor, *, eps: Positive = 1e-7) -> Tensor:
    """log(p / (1 - p)) of p = exp(mean_logps); no digits are lost near p = 1, nor where p is too small for a float.

    p is taken as exp(-eps) where it is larger, with no gradient from there: log(1 - p) has no floor at p = 1.
    """
    log_p = mean_logps.clamp(max=-eps)
    return log_p - torch.log(-torch.expm1(log_p))


def _odds_ratio(chosen: TokenStats, rejected: TokenStats, beta: float, eps: float) -> LossOutput:
    """beta times the odds-ratio loss, as a pairwise loss; the tokens of a row share its log-odds evenly."""

    def mean_logps(side: TokenStats) -> Tensor:
        return masked.mean(side.logps, side.mask, -1)

    def share(side: TokenStats) -> Tensor:
        n = masked.count(side.mask, -1)
        return (log_odds(mean_logps(side), eps=eps) / n).unsqueeze(-1).expand(side.mask.shape)

    def reward(side: TokenStats) -> Tensor:
        return beta * masked.select(side.logps, side.mask) / masked.count(side.mask, -1).unsqueeze(-1)

    return pairwise_loss(
        chosen,
        rejected,
        (share(chosen), share(rejected)),
        link=lambda z: beta * logistic(z),
        rewards=(reward(chosen), reward(rejected)),
        metrics={"nll/chosen": -mean_logps(chosen)},
    )


@method("orpo", kind="pairwise", title=TITLE, paper=PAPER, golden=("orpo",))
def orpo_loss(chosen: TokenStats, rejected: TokenStats, *, beta: Positive = 0.1, eps: Positive = 1e-7) -> LossOutput:
    """ORPO: negative log-likelihood of the chosen tokens plus beta times the odds-ratio loss.

    With a = mean_t logps of a row and odds(a) = exp(a) / (1 - exp(a)):

        z_p = log odds(a[chosen p]) - log odds(a[rejected p]),
        loss = -mean over chosen tokens of logps + beta * mean_p -log sigmoid(z_p)      (eq. 6 of arXiv 2403.07691)

    Two denominators: sums holds "chosen_tokens" (the first term) and "pairs" (the second); `per_pair` is the second
    term, `per_token` the shares of z. No reference; nothing is detached. Rewards logged: beta * a. `eps`: a is at
    most -eps in the odds. An empty row counts as log-odds 0. The likelihood is that of the response, a
    mean over the tokens of the batch; TRL counts prompt tokens too, see `orpo_with_prompt_loss`.
    """
    out = _odds_ratio(chosen, rejected, beta, eps)
    nll = -masked.sum(chosen.logps, chosen.mask)
    return dataclasses.replace(
        out, loss=out.loss + nll / masked.count(chosen.mask), sums={**out.sums, "chosen_tokens": nll}
    )


@method("orpo_with_prompt", kind="pairwise_with_prompt", title=TITLE, paper=PAPER)
def orpo_with_prompt_loss(
    chosen: TokenStats, rejected: TokenStats, prompt: TokenStats, *, beta: Positive = 0.1, eps: Positive = 1e-7
) -> LossOutput:
    """ORPO as TRL trains it: the likelihood term counts the prompt's tokens with those of the chosen response.

        loss = -mean over prompt and chosen tokens of logps + beta * mean_p -log sigmoid(z_p),    z_p as in `orpo_loss`

    `prompt`: (P, T_prompt), row p the prompt of pair p; its first token, which nothing predicts, off the mask.
    sums: "pairs", and "prompt_and_chosen_tokens", the tokens counted in both masks. A mean over rows of row means,
    as LLaMA-Factory has it, is neither.
    """
    if len(prompt.mask) != len(chosen.mask):
        raise InputError(f"{len(prompt.mask)} prompt rows but {len(chosen.mask)} chosen rows: row p of each is pair p")
    out = _odds_ratio(chosen, rejected, beta, eps)
    nll = -masked.sum(chosen.logps, chosen.mask) - masked.sum(prompt.logps, prompt.mask)
    n = (chosen.mask.sum() + prompt.mask.sum()).clamp(min=1)
    return dataclasses.replace(out, loss=out.loss + nll / n, sums={**out.sums, "prompt_and_chosen_tokens": nll})
