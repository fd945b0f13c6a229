"""One adapter a slug: from the names of a golden file to our functions, every output of the file compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from cases import Case

from tokenpo.credit import implicit_rewards
from tokenpo.losses import (
    dpo_loss,
    dpo_norm_loss,
    ipo_loss,
    ld_dpo_loss,
    robust_dpo_loss,
    simpo_loss,
    tdpo1_loss,
    tdpo2_loss,
    tgdpo_loss,
)
from tokenpo.statistics import LinearHead, dense_token_stats, linear_token_stats
from tokenpo.types import LossOutput, TokenStats


def pair_stats(case: Case) -> tuple[torch.Tensor, TokenStats]:
    logps = case.leaf("logps")
    extras = {"ref_logps": case["ref_logps"]} if "ref_logps" in case else {}
    return logps, TokenStats(mask=case.mask, logps=logps, **extras)


def sides(case: Case, stats: TokenStats) -> tuple[TokenStats, TokenStats]:
    return stats[case["chosen_rows"]], stats[case["rejected_rows"]]


def finish(case: Case, out: LossOutput, leaf: torch.Tensor, gradient: str) -> None:
    """Compare what every pairwise case has: the loss, per-pair losses where given, and the gradient."""
    case.check("out_loss", out.loss)
    if "out_losses" in case:
        case.check("out_losses", out.per_pair)
    (grad,) = torch.autograd.grad(out.loss, leaf)
    case.check(gradient, grad)


def dpo(case: Case) -> None:
    config = dict(case.config)
    loss_type = config.pop("loss_type")
    if "ld_alpha" in config:
        loss_type, config["alpha"] = "ld", config.pop("ld_alpha")
    losses: dict[str, Callable[..., LossOutput]] = {
        "sigmoid": dpo_loss, "robust": robust_dpo_loss, "sigmoid_norm": dpo_norm_loss, "ld": ld_dpo_loss,
    }  # fmt: skip
    logps, stats = pair_stats(case)
    finish(case, losses[loss_type](*sides(case, stats), **config), logps, "grad_logps")


def ipo(case: Case) -> None:
    logps, stats = pair_stats(case)
    finish(case, ipo_loss(*sides(case, stats), beta=case.config["beta"]), logps, "grad_logps")


def simpo(case: Case) -> None:
    assert case.config["cpo_alpha"] == 0.0, "SimPO has no NLL term"
    hyper = {name: case.config[name] for name in ("beta", "gamma", "label_smoothing")}
    logps, stats = pair_stats(case)
    chosen, rejected = sides(case, stats)
    out = simpo_loss(chosen, rejected, **hyper)
    finish(case, out, logps, "grad_logps")
    case.check("out_chosen_rewards", out.per_token[0].sum(-1))
    case.check("out_rejected_rewards", out.per_token[1].sum(-1))


def tdpo(case: Case) -> None:
    """Both statistics paths: logits, and hidden states times a head (the logits as hidden, an identity as head)."""
    config = case.config
    for path in (dense_stats, linear_stats):
        logits, stats = path(case)
        mask = stats.mask
        chosen, rejected = sides(case, stats)
        if config["variant"] == "tdpo1":
            out = tdpo1_loss(chosen, rejected, beta=config["beta"])
        else:
            out = tdpo2_loss(chosen, rejected, beta=config["beta"], alpha=config["alpha"])
        finish(case, out, logits, "grad_logits")
        margin = torch.where(mask, stats.logps - stats.ref_logps, 0.0)
        kl = torch.where(mask, stats.ref_kl, 0.0)
        case.check("out_seq_margin", margin.sum(-1))
        case.check("out_seq_kl", kl.sum(-1))
        case.check("out_position_kl", kl)
        reward = config["beta"] * (margin + kl).sum(-1)
        case.check("out_chosen_rewards", reward[case["chosen_rows"]])
        case.check("out_rejected_rewards", reward[case["rejected_rows"]])
        torch.testing.assert_close(out.metrics["rewards/chosen"], reward[case["chosen_rows"]].mean().detach())
        for name in ("logps", "ref_logps"):
            torch.testing.assert_close(getattr(stats, name)[mask], case[name][mask], rtol=1e-9, atol=1e-12)


def dense_stats(case: Case) -> tuple[torch.Tensor, TokenStats]:
    logits = case.leaf("logits")
    outputs = ("logps", "ref_kl")
    return logits, dense_token_stats(logits, case["tokens"], case.mask, ref_logits=case["ref_logits"], outputs=outputs)


def linear_stats(case: Case) -> tuple[torch.Tensor, TokenStats]:
    logits, mask = case.leaf("logits"), case.mask
    head = LinearHead(torch.eye(logits.shape[-1], dtype=logits.dtype))
    values = linear_token_stats(
        logits[mask], head, case["tokens"][mask], outputs=("logps", "ref_logps", "ref_kl"),
        ref_hidden=case["ref_logits"][mask], ref_head=head,
    )  # fmt: skip
    rows = {name: torch.zeros(mask.shape, dtype=v.dtype).masked_scatter(mask, v) for name, v in values.items()}
    return logits, TokenStats(mask=mask, **rows)


def tgdpo(case: Case) -> None:
    alpha, beta = case.config["alpha"], case.config["beta"]
    logps, stats = pair_stats(case)
    rewards = implicit_rewards(case["guide_logps"], case["ref_logps"], case.mask, beta=beta)
    stats = dataclasses.replace(stats, token_rewards=rewards)
    chosen, rejected = sides(case, stats)
    out = tgdpo_loss(chosen, rejected, beta=beta, alpha=alpha)
    finish(case, out, logps, "grad_logps")
    mask = case.mask
    case.check("out_token_rewards", rewards)
    signs = torch.ones(len(mask), 1, dtype=rewards.dtype)
    signs[case["rejected_rows"]] = -1.0
    weights = torch.where(mask, 1.0 + signs * alpha * rewards, 0.0)
    case.check("out_token_weights", torch.where(mask, weights, case["out_token_weights"]))
    # The released code logs rewards per token without the weights: beta * d.
    ratio = beta * torch.where(mask, stats.logps - stats.ref_logps, 0.0)
    for side in ("chosen", "rejected"):
        rows = case[f"{side}_rows"]
        expected = case[f"out_{side}_token_rewards"]
        case.check(f"out_{side}_token_rewards", torch.where(mask[rows], ratio[rows], expected))
    # The weights that the loss used are those of the file: recover them from the summands of z.
    used = torch.cat(out.per_token).detach()
    used_weights = torch.cat([weights[case["chosen_rows"]], weights[case["rejected_rows"]]])
    torch.testing.assert_close(used, (used_weights * ratio.detach()), rtol=1e-9, atol=1e-12)


ADAPTERS: dict[str, Callable[[Case], None]] = {
    "dpo": dpo,
    "ipo": ipo,
    "simpo": simpo,
    "tdpo": tdpo,
    "tgdpo": tgdpo,
}
