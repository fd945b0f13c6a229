"""Adapters of SparsePO and MaPO, critical-token DPO, and Ra-DPO."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from adapters_pairs import dense_stats, pair_stats, sides
from cases import Case
from torch import Tensor

from tokenpo.credit import (
    AllLayersMask,
    LastLayerMask,
    contrastive_scores,
    critical_weights,
    first_critical_token,
    mapo_sigmoid_weights,
    mapo_weights,
    released_critical_token,
    with_last_token,
)
from tokenpo.credit.sparse_mask import identity, relu
from tokenpo.losses import (
    critical_dpo_loss,
    critical_dpo_per_position_loss,
    cvar_risk,
    entropic_risk,
    logistic,
    ra_dpo1_loss,
    ra_dpo2_loss,
    released_risk,
    released_split_risk,
    released_thresholded_stats,
    sparsepo_common_loss,
    sparsepo_loss,
)
from tokenpo.statistics import dense_token_stats
from tokenpo.types import LossOutput


def check_gradients(case: Case, loss: Tensor, leaves: dict[str, Tensor]) -> None:
    """Hold the gradient of each leaf to `grad_<name>`; a leaf that the loss does not read has gradient zero."""
    names = [name for name in leaves if f"grad_{name}" in case]
    grads = torch.autograd.grad(loss, [leaves[name] for name in names], allow_unused=True)
    for name, grad in zip(names, grads, strict=True):
        grad = torch.zeros_like(leaves[name]) if grad is None else grad
        case.check(f"grad_{name}", grad.reshape(case[f"grad_{name}"].shape))


def sparsepo(case: Case, mask_u: Tensor, mask_d: Tensor | None) -> tuple[Tensor, LossOutput]:
    """The loss of a case for two masks, or one common mask."""
    config = case.config
    hyper = {"beta": config["beta"], "l1_weights": config.get("l1_u", 0.0), "l1_kl": config.get("l1_d", 0.0)}
    logits, stats = dense_stats(case)
    case.check("out_position_kl", stats.ref_kl)
    if mask_d is None:
        chosen, rejected = sides(case, dataclasses.replace(stats, token_weights=mask_u))
        return logits, sparsepo_common_loss(chosen, rejected, **hyper)
    if not config.get("mask_on_kl", True):
        mask_d, hyper["l1_kl"] = torch.ones_like(mask_d), 0.0
    chosen, rejected = sides(case, dataclasses.replace(stats, token_weights=mask_u, kl_weights=mask_d))
    return logits, sparsepo_loss(chosen, rejected, **hyper)


def sparsepo_free_masks(case: Case) -> None:
    leaves = {"mask_u": case.leaf("mask_u")}
    if not case.config["common"]:
        leaves["mask_d"] = case.leaf("mask_d")
    leaves["logits"], out = sparsepo(case, leaves["mask_u"], leaves.get("mask_d"))
    case.check("out_loss", out.loss)
    check_gradients(case, out.loss, leaves)


def network(case: Case, prefix: str = "") -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """The mask network with a case's parameters, and those by the case's names."""
    n_layers, hidden_size = case[f"{prefix}layer_w"].shape
    config = case.config
    if config["mask_model"] == "simple_last":
        net = LastLayerMask(hidden_size).double()
        parameters = {"layer_w": net.weight, "layer_b": net.bias}
    else:
        named = {"relu": relu, "none": identity}
        activations = {
            f"{place}_activation": named[config.get(f"{place}_activation", "relu")] for place in ("layer", "mixer")
        }
        net = AllLayersMask(n_layers, hidden_size, eps=config["ln_eps"], **activations).double()
        parameters = {
            "layer_w": net.weight, "layer_b": net.bias, "mixer_w": net.mixer,
            "ln_weight": net.norm.weight, "ln_bias": net.norm.bias,
        }  # fmt: skip
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(case[prefix + name].reshape(parameter.shape))
    return net, {prefix + name: parameter for name, parameter in parameters.items()}


def unmasked(case: Case, net: torch.nn.Module) -> Tensor:
    """The weights at every position, as the files hold them; ours are these at the counted ones and zero elsewhere."""
    everywhere = net(case["hidden_states"], torch.ones_like(case.mask))
    torch.testing.assert_close(net(case["hidden_states"], case.mask), torch.where(case.mask, everywhere, 0.0))
    return everywhere


def sparsepo_networks(case: Case) -> None:
    if "upstream" in case:
        net, leaves = network(case)
        weights = unmasked(case, net)
        case.check("out_token_weights", weights)
        check_gradients(case, (weights * case["upstream"]).sum(), leaves)
        return
    masks, leaves = {}, {}
    for side in ("u", "d"):
        if f"{side}_layer_w" in case:
            net, parameters = network(case, f"{side}_")
            masks[side] = unmasked(case, net)
            case.check(f"out_mask_{side}", masks[side])
            leaves |= {**parameters, f"mask_{side}": masks[side]}
    leaves["logits"], out = sparsepo(case, masks["u"], masks.get("d"))
    case.check("out_loss", out.loss)
    check_gradients(case, out.loss, leaves)


def mapo(case: Case) -> None:
    mask, config = case.mask, case.config
    activations: dict[str, list[Tensor]] = {}
    for name, kind in config["acts"].items():
        if kind in config["hook_types"]:
            activations.setdefault(kind, []).append(case[f"act_{name}"])
    if "logits" in config["hook_types"]:
        activations["logits"] = [case["ref_logits"]]
    weigh = {"zn_rescale": mapo_weights, "sigmoid": mapo_sigmoid_weights}[config["mapping"]]
    weights = mask.double() if config["hook_types"] == ["uniform"] else weigh(activations, mask)
    for name in ("out_token_weights", "out_token_weights_fp16cast"):
        # A row of one token is 0/0 in the released code; the notes leave it to us, and it is 1 here.
        case.tensors[name] = torch.where(case[name].isnan(), mask.to(case[name].dtype), case[name])
    case.check("out_token_weights", weights)
    case.check("out_token_weights_fp16cast", weights, rtol=0.0, atol=2e-3)
    if "out_loss" not in case:
        return
    logits, out = sparsepo(case, weights, weights)
    case.check("out_loss", out.loss)
    case.check("out_losses", out.per_pair)
    check_gradients(case, out.loss, {"logits": logits})
    # The summands are beta (u d + v K); the authors' rewards subtract the KL.
    _, stats = dense_stats(case)
    kl = config["beta"] * (weights * stats.ref_kl).sum(-1)
    for side, terms in zip(("chosen", "rejected"), out.per_token, strict=True):
        rewards = terms.sum(-1) - 2.0 * kl[case[f"{side}_rows"]]
        case.check(f"out_{side}_rewards", rewards)
        torch.testing.assert_close(out.metrics[f"rewards/{side}"], rewards.mean().detach())


def cdpo_score(case: Case) -> None:
    score = functools.partial(
        contrastive_scores, case["pos_logits"], case["neg_logits"], case["tokens"], beta=case.config["beta_ce"]
    )
    scores = score(case.mask)
    case.check("out_scores", scores)
    case.check("out_token_weights", critical_weights(scores, case.mask))
    if "out_scores_with_prompt" in case:
        # The prompt's tokens and the response's, not the padding behind.
        with_prompt = case.mask.flip(-1).cumsum(-1).flip(-1) > 0
        case.check("out_scores_with_prompt", score(with_prompt))


def cdpo_loss(case: Case) -> None:
    config, mask, scores = case.config, case.mask, case["scores"]
    released = config["variant"] == "code_per_position"
    last = with_last_token if released else lambda weights, mask: weights
    weights = torch.ones_like(scores) if config.get("only_neg", True) else last(scores, mask)
    rows = case["rejected_rows"]
    weights[rows] = last(critical_weights(scores, mask), mask)[rows]
    case.check("out_token_weights", torch.where(mask, weights, 0.0))
    logps, stats = pair_stats(case)
    chosen, rejected = sides(case, dataclasses.replace(stats, token_weights=weights))
    if released:
        smoothing = config["label_smoothing"]
        if config["only_neg"]:
            chosen = dataclasses.replace(chosen, token_weights=None)
        out = critical_dpo_per_position_loss(
            chosen, rejected, gamma=config["gamma"], label_smoothing=smoothing, width=mask.shape[1]
        )
        case.check("out_position_losses", logistic(out.per_token[0] - out.per_token[1], smoothing))
    else:
        out = critical_dpo_loss(chosen, rejected, gamma=config["gamma"])
        case.check("out_losses", out.per_pair)
    case.check("out_loss", out.loss)
    check_gradients(case, out.loss, {"logps": logps})


def cdpo_rollout(case: Case) -> None:
    config = case.config
    rollouts = config["n_rollouts"]
    counts = case["correct_counts"]
    paper = first_critical_token(counts, case.mask, threshold=config["threshold"], rollouts=rollouts)
    case.check("out_critical_paper", paper)
    code = released_critical_token(counts, case.mask, reset_count=config["code_reset_count"], rollouts=rollouts)
    case.check("out_critical_code", code)


def ra_dpo(case: Case) -> None:
    config, mask = case.config, case.mask
    logits, tokens, ref_logits = case.leaf("logits"), case["tokens"], case["ref_logits"]
    stats = dense_token_stats(logits, tokens, mask, ref_logits=ref_logits, outputs=("logps", "ref_kl"))
    if "out_seq_kl" in case:
        case.check("out_seq_kl", stats.ref_kl.sum(-1))
    level = config.get("confidence_level")
    if config.get("is_cal_risk_distribution_logps"):
        assert config["is_split_risk_ratio"]
        stats = released_thresholded_stats(logits, ref_logits, tokens, mask, level=level)
    else:
        risk: Callable[..., Tensor] = {
            "cvar": functools.partial(cvar_risk, mu=config.get("mu")),
            "erm": functools.partial(entropic_risk, mu=config.get("mu")),
            True: functools.partial(released_split_risk, level=level),
            False: functools.partial(released_risk, level=level),
        }[config.get("risk", config.get("is_split_risk_ratio"))]
        stats = dataclasses.replace(stats, ref_risk=risk(logits, ref_logits, mask))
    pairs = len(mask) // 2
    chosen, rejected = stats[:pairs], stats[pairs:]
    if config.get("if_ra_dpo2", config.get("variant") == 2):
        out = ra_dpo2_loss(chosen, rejected, beta=config["beta"], alpha=config["alpha"])
    else:
        out = ra_dpo1_loss(chosen, rejected, beta=config["beta"])
    case.check("out_loss", out.loss)
    case.check("out_pair_losses", out.per_pair)
    case.check("out_token_risk", stats.ref_risk)
    case.check("out_seq_risk", stats.ref_risk.sum(-1))
    margin = (stats.logps - stats.ref_logps).sum(-1)
    case.check("out_seq_margin", margin)
    if "out_chosen_rewards" in case:
        rewards = config["beta"] * (margin + stats.ref_risk.sum(-1))
        case.check("out_chosen_rewards", rewards[:pairs])
        case.check("out_rejected_rewards", rewards[pairs:])
        torch.testing.assert_close(out.metrics["rewards/chosen"], rewards[:pairs].mean().detach())
    check_gradients(case, out.loss, {"logits": logits})


ADAPTERS: dict[str, Callable[[Case], None]] = {
    "cdpo_loss": cdpo_loss,
    "cdpo_rollout": cdpo_rollout,
    "cdpo_score": cdpo_score,
    "ra_dpo": ra_dpo,
    "sparsepo_loss": sparsepo_free_masks,
    "sparsepo_mapo": mapo,
    "sparsepo_mask": sparsepo_networks,
}
