"""Golden vectors of online RL, part B: objectives, aggregation, KL, critics, shapers by entropy, filters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from cases import Case
from torch import Tensor

from tokenpo import masked
from tokenpo.advantages import (
    D3SSchedule,
    ar_advantages,
    ar_weights,
    d3s_budget,
    d3s_group_rows,
    d3s_rows,
    d3s_tokens,
    disagreement,
    dynamic_sampling,
    exact_set_rewards,
    grpo_advantages,
    hapo_centred_group_average_advantages,
    hapo_group_average_advantages,
    hapo_plain_group_average_advantages,
    hapo_released_temperature,
    hapo_temperature,
    hapo_unscaled_temperature,
    least_correct_score,
    length_adaptive_lambda,
    lopti_stages,
    nthr_advantages,
    nthr_scores,
    overlong_penalty,
    overlong_rewards,
    ppo_gae_advantages,
    prediction_errors,
    soft_set_rewards,
    thr_advantages,
    thr_scores,
    token_deviations,
    tw_grpo_advantages,
    tw_grpo_released_weights,
    tw_grpo_weights,
    unbounded_overlong_penalty,
    value_targets,
    vapo_advantages,
    whitened_advantages,
)
from tokenpo.advantages.groups import group_rows
from tokenpo.losses import (
    EntropyStatistics,
    aspo_by_entropy_loss,
    aspo_loss,
    cispo_loss,
    dapo_loss,
    entropy_signal,
    entropy_statistics,
    gspo_loss,
    gspo_sequence_loss,
    hapo_clip_range,
    hapo_loss,
    hapo_redistribute,
    hapo_released_loss,
    low_entropy_tokens,
    positive_example_loss,
    ppo_clip_loss,
    ppo_clip_ranges_loss,
    released_entropy_signal,
    value_loss,
    vapo_loss,
)
from tokenpo.losses.kl import ESTIMATORS, k3
from tokenpo.masked import aggregate
from tokenpo.statistics import dense_token_stats
from tokenpo.types import LossOutput, TokenStats

WHITENED = 1e-8
"""Absolute tolerance of whitened advantages: the released whitening divides by the count + 1e-8."""

FIELDS = ("ref_logps", "old_logps", "entropy")


def stats_of(case: Case, logps: Tensor, **others: Tensor) -> TokenStats:
    given = {name: case[name] for name in FIELDS if name in case}
    return TokenStats(mask=others.pop("mask", case.mask), logps=logps, **{**given, **others})


def check_loss(
    case: Case, loss: Callable[..., LossOutput], advantages: Tensor, suffix: str = "", **fields: Tensor
) -> LossOutput:
    """Value and gradient of a policy-gradient loss, and that its sums over the batch's counts are the loss."""
    logps = case.leaf("logps")
    stats = stats_of(case, logps, **fields)
    out = loss(stats, advantages)
    case.check(f"out_loss{suffix}", out.loss)
    case.check(f"grad_logps{suffix}", torch.autograd.grad(out.loss, logps)[0])
    counts = masked.unit_counts(stats.mask)
    torch.testing.assert_close(sum(total / counts[unit] for unit, total in out.sums.items()), out.loss)
    return out


def same(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours.to(expected.dtype), expected, rtol=1e-9, atol=1e-12)


def ppo_gae(case: Case) -> None:
    config, mask = case.config, case.mask
    assert config["whiten"] and config["std_ddof"] == 1
    none = torch.zeros(len(mask), dtype=torch.float64)
    given = {"gamma": config["gamma"], "lam": config["lam"]}
    advantages = ppo_gae_advantages(none, none.long(), mask, case["values"], case["token_rewards"], **given)
    returns = value_targets(none, mask, case["values"], case["token_rewards"], **given)
    case.check("out_advantages", advantages, atol=WHITENED)
    case.check("out_returns", returns)
    advantages = case["out_advantages"]
    clip = config["clip"]
    loss = partial(ppo_clip_loss, clip_low=clip, clip_high=clip, dual_clip=config["clip_ratio_c"])
    check_loss(case, loss, advantages)
    critic = case["vpreds"], case["values"], returns, mask
    case.check("out_value_loss", value_loss(*critic, clip=config["value_clip"]).loss)
    case.check("out_value_loss_unclipped", value_loss(*critic, clip=None).loss)


def vapo(case: Case) -> None:
    config, mask, rewards = case.config, case.mask, case["rewards"]
    assert config["lambda_clamp"] == [0, 1]
    same(torch.where(mask.any(-1), rewards, 0.0), masked.sum(case["token_rewards"], mask, -1))
    one_group = torch.zeros_like(rewards).long()
    raw = vapo_advantages(rewards, one_group, mask, case["values"], alpha=config["alpha"], gamma=config["gamma"])
    white = whitened_advantages(raw, mask)
    case.check("out_lambda", length_adaptive_lambda(mask, alpha=config["alpha"]))
    case.check("out_lambda_unclamped", 1 - 1 / (config["alpha"] * mask.sum(-1).double()))
    case.check("out_advantages", raw)
    case.check("out_advantages_whitened", white, atol=WHITENED)
    white = case["out_advantages_whitened"]
    returns = value_targets(rewards, mask, case["values"], gamma=config["gamma"], lam=config["lambda_critic"])
    case.check("out_returns", returns)
    critic = case["vpreds"], case["values"], returns, mask
    case.check("out_value_loss_mse", value_loss(*critic, clip=None).loss)
    case.check("out_value_loss_clipped", value_loss(*critic, clip=config["value_clip"]).loss)
    correct, advantages = rewards > 0.5, white if config["whiten"] else raw
    logps = case.leaf("logps")
    stats, clips = stats_of(case, logps), {"clip_low": config["clip_low"], "clip_high": config["clip_high"]}
    out = vapo_loss(stats, advantages, correct, mu=config["mu"], **clips)
    case.check("out_loss", out.loss)
    case.check("grad_logps", torch.autograd.grad(out.loss, logps)[0])
    case.check("out_ppo_loss", ppo_clip_loss(stats, advantages, dual_clip=None, **clips).loss)
    case.check("out_nll_loss", positive_example_loss(stats, correct).loss)


def hapo(case: Case) -> None:
    if case.config.get("component") == "TGA":
        hapo_group_average(case)
    elif "logits" in case:
        hapo_temperatures(case)
    else:
        hapo_objective(case)


def hapo_group_average(case: Case) -> None:
    config, mask, rewards, group = case.config, case.mask, case["rewards"], case["group"]
    assert config["norm_by_std"] and config["std_ddof"] == 0
    eps, largest = config["epsilon"], config["fallback_threshold"]
    near = {"atol": 1e-9}  # equal rewards leave rounding of 1e-16 divided by eps of 1e-6 in the released code
    plain = hapo_plain_group_average_advantages(rewards, group, mask, eps=eps)
    ours = hapo_group_average_advantages(rewards, group, mask, eps=eps, largest=largest)
    # The released code tests padding as well, where it stands for a reward of 0, and takes a group of one as it is.
    groups = group_rows(rewards, group, mask)
    centred, scale = token_deviations(groups, mask)
    off_mask = (centred - rewards) / (scale + eps)
    far = (plain.abs() >= largest).any(-1) | ((off_mask.abs() >= largest) & ~mask.all(-1))
    fallen = torch.stack([far[group == g].any() for g in group])
    grpo = grpo_advantages(rewards, group, mask, eps=eps, singleton="raw")
    case.check("out_advantages", torch.where(fallen[:, None], grpo, plain), **near)
    if "out_advantages_unmasked" in case:
        assert not fallen.any()
        case.check("out_advantages_unmasked", torch.where(mask, plain, off_mask[:, None]), **near)
        return
    case.check("out_advantages_masked_fallback", ours, **near)
    case.check("out_advantages_formula", plain, **near)
    case.check("out_advantages_no_std", hapo_centred_group_average_advantages(rewards, group, mask))


def hapo_objective(case: Case) -> None:
    config, mask, advantages = case.config, case.mask, case["advantages"]
    pivot = {"entropy_pivot": config["entropy_pivot"]}
    clips = {name: config[name] for name in ("clip_low", "clip_high")}
    hyper: dict[str, Any] = {**pivot, **clips, "dual_clip": config["clip_ratio_c"]}
    hyper["clip_alpha"] = config.get("clip_alpha", float(config.get("adaptive_clip", True)))
    hyper["adv_beta"] = config.get("adv_beta", float(config.get("adaptive_advantage", True)))
    hyper.pop("entropy_pivot")
    signed = config.get("h_sign") == "signed" or ("out_h_hat" not in case and config["clip_ratio_c"] is None)
    loss, signal_of = (hapo_loss, entropy_signal) if signed else (hapo_released_loss, released_entropy_signal)
    signal = signal_of(case["entropy"], mask, **pivot)
    check_loss(case, partial(loss, entropy_signal=signal, **hyper), advantages)
    if "signed" in config:
        own = {**config["signed"], "dual_clip": config["signed"]["clip_ratio_c"]}
        own.pop("clip_ratio_c")
        own_pivot = {"entropy_pivot": own.pop("entropy_pivot", pivot["entropy_pivot"])}
        own["entropy_signal"] = entropy_signal(case["entropy"], mask, **own_pivot)
        check_loss(case, partial(hapo_loss, **{**hyper, **own}), advantages, "_signed")
    if "out_h_hat" not in case:
        return
    low, high = hapo_clip_range(signal, **clips, clip_alpha=hyper["clip_alpha"])
    ratio = (case["logps"] - case["old_logps"]).exp()
    moved = hapo_redistribute(advantages, signal, ratio, low, high, adv_beta=hyper["adv_beta"])
    for name, ours in (("h_hat", signal), ("clip_low", low), ("clip_high", high), ("advantages", moved)):
        expected = case[f"out_{name}"]
        case.check(f"out_{name}", torch.where(mask, ours, expected))
    by_ranges = ppo_clip_ranges_loss(stats_of(case, case["logps"]), moved, low, high, dual_clip=hyper["dual_clip"])
    case.check("out_loss", by_ranges.loss)
    if "out_pivot" in case:
        statistics = entropy_statistics(case["entropy"], mask, **pivot)
        for name in ("pivot", "std", "scale_pos", "scale_neg"):
            case.check(f"out_{name}", getattr(statistics, name))


def hapo_temperatures(case: Case) -> None:
    config = case.config
    logps = case["logits"].log_softmax(-1)
    entropy = -(logps.exp() * logps).sum(-1)
    statistics = EntropyStatistics(*(case[name] for name in ("pivot", "std", "scale_pos", "scale_neg")))
    assert config["clamp"] == [-1, 1] and config["eps"] == 1e-6
    given = {"base": config["T_base"], "tau": config["tau_code"]}
    case.check("out_temperature_code", hapo_released_temperature(entropy, statistics, **given), rtol=1e-6)
    case.check("out_temperature_signed", hapo_temperature(entropy, statistics, **given))
    paper = hapo_unscaled_temperature(entropy, statistics, base=config["T_base"], tau=config["tau_paper"])
    case.check("out_temperature_paper_eq8", paper)


def thr(case: Case) -> None:
    config, mask, rewards, group = case.config, case.mask, case["rewards"], case["group"]
    rows = rewards, group, mask
    inputs = case["hidden"], *prediction_errors(case["old_logits"], case["tokens"])
    if config["length_normalised"]:
        scores, beta = thr_scores(*rows, *inputs), config.get("beta_tau", 1.0)
        ours = thr_advantages(case["advantages"], mask, rewards, group, *inputs, p=config["p"], beta=beta)
    else:
        assert config["eta"] == "2*|0.5-p|"
        scores, beta = nthr_scores(*rows, *inputs), config["beta"]
        ours = nthr_advantages(case["advantages"], mask, rewards, group, *inputs, beta=beta)
    case.check("out_token_rewards", scores)
    case.check("out_advantages", ours)
    tau = beta * least_correct_score(scores, *rows)
    first = torch.tensor([int((group == g).nonzero()[0]) for g in torch.unique(group)])
    case.check("out_tau", tau[first])


def tw_grpo(case: Case) -> None:
    config = case.config
    if "pred_set" in case:
        case.check("out_rewards_soft", soft_set_rewards(case["pred_set"], case["gold_set"]))
        case.check("out_rewards_exact", exact_set_rewards(case["pred_set"], case["gold_set"]))
        return
    mask, group, tokens, alpha = case.mask, case["group"], case["tokens"], config["alpha"]
    assert config.get("clamp", 11.0) == 11.0
    base = grpo_advantages(case["rewards"], group, mask, eps=config["adv_eps"])
    same(base, torch.where(mask, case["advantages"][:, None], 0.0))
    apart = disagreement(case["logits"], group, mask)
    case.check("out_token_weights", tw_grpo_weights(apart, group, mask, alpha=alpha))
    shaped = tw_grpo_advantages(base, mask, group, apart, alpha=alpha)
    same(shaped, base * case["out_token_weights"])
    ref_logits = case.tensors.get("ref_logits")
    # Its KL is cut at +-11 nats; the plain estimate is the same within.
    loss = partial(ppo_clip_loss, clip_low=config["eps_low"], clip_high=config["eps_high"], dual_clip=None,
                   kl_coef=config["beta"])  # fmt: skip
    for name, weigh in (
        ("grad_logits", tw_grpo_weights),
        ("grad_logits_weights_attached", tw_grpo_released_weights),
    ):
        if name not in case:
            continue
        logits = case.leaf("logits")
        stats = dense_token_stats(logits, tokens, mask, ref_logits=ref_logits)
        stats = TokenStats(
            mask=mask, logps=stats.logps, old_logps=stats.logps.detach(), ref_logps=stats.ref_logps,
            token_weights=weigh(disagreement(logits, group, mask), group, mask, alpha=alpha),
        )  # fmt: skip
        out = loss(stats, base)
        case.check("out_loss", out.loss)
        case.check(name, torch.autograd.grad(out.loss, logits)[0])


def ar_lopti(case: Case) -> None:
    config, mask, old = case.config, case.mask, case["old_logps"]
    loss = partial(ppo_clip_loss, clip_low=config["clip_low"], clip_high=config["clip_high"],
                   dual_clip=config["clip_ratio_c"])  # fmt: skip
    if "U0" in case:
        return lopti_toy(case, loss)
    # This code cuts the KL's exponent at +-5 nats and its value at 10; the common cut is the same within.
    loss = partial(loss, kl_coef=config["kl_coef"], kl="k3_clamped")
    advantages = ar_advantages(case["advantages"], mask, old, alpha=config["alpha"])
    case.check("out_advantages", advantages)
    if "out_token_weights" in case:
        case.check("out_token_weights", ar_weights(old, mask, alpha=config["alpha"]))
    if "eta" not in config:
        check_loss(case, loss, advantages)
        return None
    stages = lopti_stages(old, mask, eta=abs(config["eta"]))
    stages = stages.flip(0) if config["eta"] < 0 else stages
    for i, stage in enumerate(stages):
        case.check(f"out_stage{i + 1}_mask", stage)
        suffix = "_stage2" if i else ""
        logps = case.leaf(f"logps{suffix}")
        out = loss(stats_of(case, logps, token_weights=stage.double()), advantages)
        case.check(f"out_loss{suffix}", out.loss)
        case.check(f"grad_logps{suffix}", torch.autograd.grad(out.loss, logps)[0])
    return None


def lopti_toy(case: Case, loss: Callable[..., LossOutput]) -> None:
    mask, old, lr = case.mask, case["old_logps"], case.config["lr"]

    def updated(weights: Tensor, counted: Tensor) -> Tensor:
        leaf = weights.clone().requires_grad_()
        logps = (case["features"] @ leaf).log_softmax(-1).gather(-1, case["tokens"][..., None]).squeeze(-1)
        stats = TokenStats(mask=mask, logps=logps, old_logps=old, token_weights=counted.double())
        return weights - lr * torch.autograd.grad(loss(stats, case["advantages"]).loss, leaf)[0]

    first, second = lopti_stages(old, mask, eta=case.config["eta"])
    after_first = updated(case["U0"], first)
    case.check("out_U_stage1", after_first)
    case.check("out_U_final", updated(after_first, second))
    case.check("out_U_single_update", updated(case["U0"], mask))


def d3s(case: Case) -> None:
    config = case.config
    if "progress" in case:
        ends = (config["N_init"], config["N_final"]), (config["K_init"], config["K_final"])
        budgets = [d3s_budget(float(p), *ends) for p in case["progress"]]
        case.check("out_N", torch.tensor([n for n, _ in budgets]))
        case.check("out_K", torch.tensor([k for _, k in budgets], dtype=torch.float64))
        return
    mask, advantages = case.mask, case["advantages"]
    if config["scope"] == "batch":
        rows = d3s_rows(advantages, mask, keep=config["N"])
        at_start = D3SSchedule(steps=3, rows=(config["N"], 99), fraction=(config["K"], 1.0))
        chosen = at_start(advantages, mask, case["entropy"])
    else:
        rows = d3s_group_rows(advantages, mask, case["group"], keep=config["N"])
        chosen = d3s_tokens(advantages, mask & rows[:, None], case["entropy"], fraction=config["K"])
    case.check("out_sample_mask", rows)
    case.check("out_token_mask", chosen)
    loss = partial(ppo_clip_loss, clip_low=config["clip_low"], clip_high=config["clip_high"], dual_clip=None)
    check_loss(case, loss, advantages, mask=chosen)


def dapo(case: Case) -> None:
    config = case.config
    if "lengths" in case:
        lengths = case["lengths"].double()
        limits = {"max_length": config["max_resp_len"], "buffer": config["buffer_len"]}
        whole, half = config["penalty_factor"]
        case.check("out_overlong_reward", unbounded_overlong_penalty(lengths, **limits, factor=whole))
        case.check("out_overlong_reward_half", unbounded_overlong_penalty(lengths, **limits, factor=half))
        paper = overlong_penalty(lengths, **limits)
        case.check("out_overlong_reward_paper", paper)
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        same(overlong_rewards(torch.ones_like(lengths), mask, **limits), 1 + paper)
        return
    if "out_keep" in case:
        one_token = torch.ones(len(case["rewards"]), 1, dtype=torch.bool)
        keep = dynamic_sampling(case["rewards"], case["group"], one_token)
        expected = case["out_keep"].bool()
        case.check("out_keep", keep if keep.shape == expected.shape else keep[: len(expected)])
        return
    assert config["loss_agg"] == "token-mean" and not config["kl_coef"]
    clips = {"clip_low": config["clip_low"], "clip_high": config["clip_high"], "dual_clip": config["clip_ratio_c"]}
    check_loss(case, partial(dapo_loss, **clips), case["advantages"])


def gspo(case: Case) -> None:
    assert case.config["loss_agg"] == "seq-mean-token-mean"
    clips = {"clip_low": case.config["clip_low"], "clip_high": case.config["clip_high"]}
    # Advantages are constant along rows here, so that both forms of the gradient are one.
    for loss in (gspo_loss, gspo_sequence_loss):
        logps, mask = case.leaf("logps"), case.mask
        out = loss(stats_of(case, logps), case["advantages"], **clips)
        # The released row means divide by the row's tokens + 1e-8.
        released = (out.per_pair / (mask.sum(-1).double() + 1e-8)).sum() / mask.any(-1).sum()
        torch.testing.assert_close(out.loss, released, rtol=1e-7, atol=1e-12)
        case.check("out_loss", released)
        case.check("grad_logps", torch.autograd.grad(released, logps)[0])


def cispo(case: Case) -> None:
    clips = {"clip_low": case.config["clip_low"], "clip_high": case.config["clip_high"]}
    check_loss(case, partial(cispo_loss, **clips), case["advantages"])


def aspo(case: Case) -> None:
    config, mask, advantages = case.config, case.mask, case["advantages"]
    low, high = config["low_eps_low"], config["high_eps_low"]
    assert (low, high) == (config["low_eps_high"], config["high_eps_high"]) and config["loss_agg"] == "token-mean"
    hyper = {"negative_cap": config["neg_c"], "positive_cap": config["pos_c"]}
    if "kl_coef" in config:
        hyper |= {"kl_coef": config["kl_coef"], "kl": "k3_clamped"}
    stats = stats_of(case, case["logps"])
    quantile = config["token_entropy_quantile"]
    assert torch.equal(low_entropy_tokens(stats, quantile), case["low_entropy_mask"].bool() & mask)
    by_entropy = partial(aspo_by_entropy_loss, quantile=quantile, low_clip=low, high_clip=high, **hyper)
    check_loss(case, by_entropy, advantages)
    if low == high:
        check_loss(case, partial(aspo_loss, clip_low=low, clip_high=low, **hyper), advantages)
    # Metrics are means over rows: of single tokens they say which tokens a clip holds.
    held = {}
    for name in ("clip/low", "clip/high", "clip/negative_cap", "clip/positive_cap"):
        held[name] = torch.zeros(mask.shape, dtype=torch.float64)
    for b, t in mask.nonzero().tolist():
        here = {n: x[b : b + 1, t : t + 1] for n, x in stats.tensors().items()}
        width = low if case["low_entropy_mask"][b, t] else high
        out = aspo_loss(TokenStats(**here), advantages[b : b + 1, t : t + 1], clip_low=width, clip_high=width, **hyper)
        for name, values in held.items():
            values[b, t] = out.metrics[name]
    negative = mask & (advantages < 0)
    # The released means divide by their count + 1e-8.
    released = {"rtol": 1e-7}
    case.check("out_frac_lower", masked.mean(held["clip/low"], mask), **released)
    case.check("out_frac_upper", masked.mean(held["clip/high"], mask), **released)
    case.check("out_frac_dual_neg", masked.mean(held["clip/negative_cap"], negative), **released)
    case.check("out_frac_dual_pos", masked.mean(held["clip/positive_cap"], mask & ~negative), **released)


def loss_agg(case: Case) -> None:
    x, mask = case["loss_mat"], case.mask
    width = mask.shape[1]
    case.check("out_token_mean", aggregate(x, mask, "token_mean"))
    case.check("out_seq_mean_token_sum", aggregate(x, mask, "row_mean_of_sums"))
    # The released row means divide by the row's tokens + 1e-8.
    case.check("out_seq_mean_token_mean", aggregate(x, mask, "row_mean_of_means"), rtol=1e-7)
    case.check("out_seq_mean_token_sum_norm", aggregate(x, mask, "sum_over_length", length=width))
    if "global_variants" not in case.config:
        return
    case.check("out_seq_mean_token_sum_norm_scale100", aggregate(x, mask, "sum_over_length", length=100))
    whole = case.config["global_variants"]
    rows, tokens = torch.tensor(whole["global_batch_size"]), torch.tensor(whole["batch_num_tokens"])
    parts = whole["dp_size"]  # each process's loss is scaled up, for gradients are averaged over them
    case.check("out_token_mean_global", parts * aggregate(x, mask, "token_mean", tokens=tokens))
    of_rows = parts * aggregate(x, mask, "row_mean_of_means", rows=rows)
    case.check("out_seq_mean_token_mean_global", of_rows, rtol=1e-7)


def kl_estimators(case: Case) -> None:
    assert case.config == {"k3_input_clamp": 20, "k3_output_clamp": 10}
    ours = {name.replace("+", "_plus"): function for name, function in ESTIMATORS.items()}
    ours |= {"k3": ESTIMATORS["k3_clamped"], "k3_unclamped": k3}
    for name in ("abs", "k1", "k1_plus", "k2", "k3", "k3_plus", "k3_unclamped"):
        logps = case.leaf("logps")
        values = ours[name](logps - case["ref_logps"])
        case.check(f"out_{name}", values)
        case.check(f"grad_{name}", torch.autograd.grad(values.sum(), logps)[0])


ADAPTERS: dict[str, Callable[[Case], None]] = {
    "ar_lopti": ar_lopti,
    "aspo": aspo,
    "cispo": cispo,
    "d3s": d3s,
    "dapo": dapo,
    "gspo": gspo,
    "hapo": hapo,
    "kl_estimators": kl_estimators,
    "loss_agg": loss_agg,
    "ppo_gae": ppo_gae,
    "thr": thr,
    "tw_grpo": tw_grpo,
    "vapo": vapo,
}
