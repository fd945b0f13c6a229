"""Golden vectors of online RL, part A: group estimators, shapers over them, and the losses that their files hold."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from cases import Case
from torch import Tensor

from tokenpo.advantages import (
    HardAnchor,
    SoftAnchor,
    a3po_advantages,
    aapo_advantages,
    aapo_unscaled_advantages,
    answer_entropy,
    batch_accuracy,
    canon_accuracy_advantages,
    canon_advantages,
    canon_cosine_advantages,
    canon_cosine_inter_advantages,
    canon_length_advantages,
    copo_global_advantages,
    copo_global_rewards,
    cosine_with_restarts,
    dr_grpo_advantages,
    grpo_advantages,
    ha_dw_advantages,
    ha_dw_weights,
    has_children,
    highest_tokens,
    ktae_advantages,
    ktae_presence_advantages,
    ktae_presence_values,
    ktae_values,
    lowest_tokens,
    negative_advantages,
    negative_tokens,
    polarity_advantages,
    prefix_differences,
    prefix_values,
    reinforce_plus_plus_advantages,
    reinforce_plus_plus_baseline_advantages,
    reinforce_returns,
    rloo_advantages,
    scale_tokens,
    soft_blend,
    spo_chain_advantages,
    spo_cutpoints,
    spo_loss_tokens,
    spo_segment_advantages,
    spo_tree_advantages,
    spo_tree_kept,
    spo_tree_scaled_advantages,
    tempo_advantages,
    tempo_unscaled_advantages,
    tree_advantages,
    tree_child_std,
    tree_values,
    where_local_speaks,
    where_rewarded,
    whitened_over,
)
from tokenpo.credit import kl_in_reward
from tokenpo.losses.ppo import cispo_loss, dr_grpo_loss, gspo_loss, gspo_sequence_loss, ppo_clip_loss
from tokenpo.losses.reinforce import copo_loss, reinforce_loss, spo_loss
from tokenpo.types import LossOutput, TokenStats

AGGREGATION = {"token-mean": "token_mean", "seq-mean-token-mean": "row_mean_of_means"}


def near(ours: Tensor, expected: Tensor) -> None:
    """An input of the file that our functions make as well."""
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


def stats_of(case: Case, logps: Tensor, mask: Tensor | None = None) -> TokenStats:
    fields = {name: case[name] for name in ("old_logps", "ref_logps") if name in case}
    return TokenStats(mask=case.mask if mask is None else mask, logps=logps, **fields)


def check_loss(case: Case, loss: Callable[[TokenStats], LossOutput], mask: Tensor | None = None) -> None:
    logps = case.leaf("logps")
    out, value = loss(stats_of(case, logps, mask)), None
    if case.config.get("loss_agg") == "seq-mean-token-mean":  # verl divides a row by its tokens + 1e-8
        counted = case.mask if mask is None else mask
        value = (out.per_token[0].sum(-1) / (counted.sum(-1).double() + 1e-8)).mean()
        torch.testing.assert_close(out.loss, value, rtol=1e-7, atol=1e-8)
    value = out.loss if value is None else value
    case.check("out_loss", value)
    case.check("grad_logps", torch.autograd.grad(value, logps)[0])


def grpo(case: Case) -> None:
    config, rows = case.config, (case["rewards"], case["group"], case.mask)
    if "out_loss" not in case:
        assert config["std_ddof"] == 1
        case.check("out_advantages", grpo_advantages(*rows, eps=config["eps"], singleton="raw"))
        case.check("out_advantages_no_std", dr_grpo_advantages(*rows, singleton="raw"))
        return
    advantages = grpo_advantages(*rows, singleton="raw")
    near(advantages, case["advantages"])
    assert config["kl"] == "k3"
    check_loss(case, lambda stats: ppo_clip_loss(
        stats, advantages, clip_low=config["clip_low"], clip_high=config["clip_high"],
        dual_clip=config["clip_ratio_c"], aggregation=AGGREGATION[config["loss_agg"]], kl_coef=config["kl_coef"],
        kl="k3_clamped",
    ))  # fmt: skip


def dr_grpo(case: Case) -> None:
    config = case.config
    assert config["norm_by_std"] is False and config["loss_agg"] == "seq-mean-token-sum-norm"
    advantages = dr_grpo_advantages(case["rewards"], case["group"], case.mask, singleton="raw")
    near(advantages, case["advantages"])
    clips = {
        "clip_low": config["clip_low"],
        "clip_high": config["clip_high"],
        "dual_clip": config["clip_ratio_c"],
        "length": config["loss_scale_factor"],
    }
    check_loss(case, lambda stats: ppo_clip_loss(stats, advantages, aggregation="sum_over_length", **clips))
    stats = stats_of(case, case["logps"])
    case.check("out_loss_divided_by_B", dr_grpo_loss(stats, advantages, **clips).loss)


def trl_grpo(case: Case) -> None:
    config, rows = case.config, (case["rewards"], case["group"], case.mask)
    assert config["std_ddof"] == 1
    estimator = {"group": partial(grpo_advantages, eps=config["adv_eps"]), "none": dr_grpo_advantages}
    advantages = estimator[config["scale_rewards"]](*rows)
    near(advantages, case["advantages"])
    low, high, beta = config["epsilon"], config["epsilon_high"], config["beta"]
    how = {"aggregation": "token_mean", "kl_coef": beta, "kl": "k3"}
    how["aggregation"] = {"grpo": "row_mean_of_means", "dr_grpo": "row_sums_over_length"}.get(
        config["loss_type"], "token_mean"
    )
    if config["loss_type"] == "dr_grpo":
        how["length"] = config["max_completion_length"]
    if config["loss_type"] == "cispo":
        loss = partial(cispo_loss, clip_high=high - 1, **how)
    elif config["importance_sampling_level"] == "sequence":
        loss = partial(gspo_sequence_loss, clip_low=low, clip_high=high, **how)
    else:
        loss = partial(ppo_clip_loss, clip_low=low, clip_high=high, dual_clip=config["delta"], **how)
    check_loss(case, lambda stats: loss(stats, advantages))


def rloo(case: Case) -> None:
    case.check("out_advantages", rloo_advantages(case["rewards"], case["group"], case.mask, singleton="raw"))


def reinforce_plus_plus(case: Case) -> None:
    if "token_rewards" not in case:
        rows = case["rewards"], case["group"], case.mask
        case.check("out_advantages", reinforce_plus_plus_baseline_advantages(*rows, singleton="raw"))
        return
    rewards, token_rewards, gamma = case["rewards"], case["token_rewards"], case.config["gamma"]
    logps = case["old_logps"], case["ref_logps"]
    ours = kl_in_reward(*logps, rewards, case.mask, kl_coef=case.config["kl_coef"])
    torch.testing.assert_close(ours, token_rewards, rtol=1e-10, atol=1e-12)
    case.check("out_returns", reinforce_returns(rewards, case.mask, token_rewards, gamma=gamma))
    group = torch.zeros(len(rewards), dtype=torch.long)
    ours = reinforce_plus_plus_advantages(rewards, group, case.mask, token_rewards, gamma=gamma)
    case.check("out_advantages", ours)


def tempo(case: Case) -> None:
    config, args = case.config, (case["rewards"], case["group"], case.mask, case["tokens"])
    case.check("out_prefix_values", prefix_values(*args))
    case.check("out_td", prefix_differences(*args))
    scaled = partial(tempo_advantages, eps=config["eps"], unbiased=config["unbiased"])
    case.check("out_advantages", (scaled if config["norm_std"] else tempo_unscaled_advantages)(*args))


def ktae(case: Case) -> None:
    config, args = case.config, (case["rewards"], case["group"], case.mask, case["tokens"])
    how = {
        "fisher_weight": config["alpha"],
        "gain_weight": config["beta_ig"],
        "top": config["top"],
        "ignore_token_ids": tuple(config["ignore_token_ids"]),
    }
    values, estimator = ktae_presence_values, ktae_presence_advantages
    if config["gamma_tf"]:
        how |= {"saturation": config["k1"], "length_penalty": config["b"]}
        values, estimator = ktae_values, ktae_advantages
    case.check("out_token_weights", values(*args, **how))
    case.check("out_advantages", estimator(*args, eps=config["eps_std"], singleton="raw", **how))
    # The released exact comparisons of rounded probabilities: kept in the files for information, see their notes.
    case.compared |= {"out_advantages_unpatched_float32", "out_advantages_unpatched_float64"}


def a3po(case: Case) -> None:
    config, mask, rewards = case.config, case.mask, case["rewards"]
    estimator = grpo_advantages if config.get("norm", True) else dr_grpo_advantages
    base = estimator(rewards, case["group"], mask, singleton="raw")
    if "step" in config:
        how = {"fraction": config["frac"], "step": config["step"]}
        how |= {"positive_factor": config["rho_pos"], "negative_factor": config["rho_neg"]}
        how |= {"positive_decay": config["alpha_pos"], "negative_decay": config["alpha_neg"]}
        shape = partial(a3po_advantages, mask=mask, rewards=rewards, old_logps=case["old_logps"], **how)
        case.check("out_advantages", shape(base))
        case.check("out_token_weights", shape(mask.double()))
        return
    case.check("out_base_advantages", base)
    if config.get("advantage") == "weighted":
        ours = polarity_advantages(
            base, mask, rewards, positive_factor=config["pw"], negative_factor=config["nw"]
        )  # fmt: skip
        case.check("out_advantages", ours)
        return
    metric = {"prob": case["old_logps"], "entropy": case["entropy"]}[config["metric"]]
    ours = base
    for polarity, value in (("positive", 1.0), ("negative", 0.0)):
        for end, select in (("high", highest_tokens), ("low", lowest_tokens)):
            fraction, factor = (config.get(f"token_weighted_{polarity}_{end}_{x}") for x in ("num_ratio", "scale"))
            if fraction is not None:
                chosen = select(metric, mask, fraction=fraction) & (rewards == value).unsqueeze(-1)
                ours = scale_tokens(ours, mask, chosen, factor=factor)
    case.check("out_advantages", ours)


def spo_chain(case: Case) -> None:
    config, mask, old_logps = case.config, case.mask, case["old_logps"]
    segments = {"threshold": config["prob_threshold"], "interval": config["cutpoint_interval"]}
    assert torch.equal(spo_cutpoints(old_logps, mask, **segments), case["cutpoints"].bool())
    uncertain = spo_loss_tokens(old_logps, mask, threshold=config["prob_threshold"])
    counted = uncertain if config["use_prob_mask"] else mask
    case.check("out_token_weights", counted)
    args = case["rewards"], mask, old_logps, case["prefix_values"]
    x = spo_segment_advantages(*args, **segments)
    case.check("out_advantages", x)
    white = whitened_over(x, mask, counted, eps=config["whiten_eps"])
    case.check("out_whitened_advantages", white)
    if config["use_prob_mask"]:
        group = torch.arange(len(mask))
        ours = spo_chain_advantages(args[0], group, *args[1:], eps=config["whiten_eps"], **segments)
        near(ours, torch.where(counted, white, 0.0))
    check_loss(case, lambda stats: spo_loss(
        stats, white, clip_low=config["cliprange"], clip_high=config["cliprange"], kl_coef=config["kl_coef"],
        largest=config["log_ratio_clamp"], ratio_limit=config["ratio_skip"],
    ), mask=counted)  # fmt: skip


def spo_tree(case: Case) -> None:
    config, parent, leaves = case.config, case["parent"], case["leaf_rewards"]
    case.check("out_node_values", tree_values(parent, leaves))
    inner = has_children(parent)
    assert case["out_child_std"][~inner].isnan().all()
    case.tensors["out_child_std"] = torch.where(inner, case["out_child_std"], 0.0)
    case.check("out_child_std", tree_child_std(parent, leaves))
    kept = spo_tree_kept(leaves, parent) if config["only_nonzero"] else parent >= 0
    case.check("out_sample_filter", kept)
    rows = leaves, torch.zeros_like(parent), torch.ones(len(parent), 1, dtype=torch.bool), parent
    scaled = partial(spo_tree_scaled_advantages, eps=config["eps"])
    ours = {"rloo": spo_tree_advantages, "grpo": scaled}[config["adv_method"]](*rows)[:, 0]
    case.check("out_advantages", ours)
    if config["adv_method"] == "rloo":
        near(tree_advantages(parent, leaves), ours)


def canon(case: Case) -> None:
    config = case.config
    if "steps" in case:
        steps, how = case["steps"].tolist(), {"warmup": config["warmup"]}
        how["cycle"] = (config["total"] - config["warmup"]) // config["cycles"]
        intra = [cosine_with_restarts(s, high=config["max_lr"], low=config["min_lr"], **how) for s in steps]
        inter = [cosine_with_restarts(s, high=config["r_max"], low=config["r_min"], **how) for s in steps]
        case.check("out_intra_weight_cosine", torch.tensor(intra, dtype=torch.float64))
        case.check("out_intra_weight_cosine_r", 1 - torch.tensor(inter, dtype=torch.float64))
        return
    rows, how = (case["rewards"], case["group"], case.mask), {"length": config["max_length"], "singleton": "raw"}
    case.check("out_dr_grpo_advantages", dr_grpo_advantages(*rows, singleton="raw") / config["max_length"])
    if "_lambda" in config:
        how |= {"inter_weight": config["_lambda"], "alpha": config["alpha"], "beta": config["beta"]}
    if config["metric"] == "length":
        ours = canon_length_advantages(*rows, **how)
    elif "cosine_with_restart_r" in config["estimator"]:
        ours = canon_cosine_inter_advantages(*rows, case["entropy"], config["step"], **how)
    elif "cosine_with_restart" in config["estimator"]:
        ours = canon_cosine_advantages(*rows, case["entropy"], config["step"], **how)
    elif "annel" in config["estimator"]:
        ours = canon_accuracy_advantages(*rows, case["entropy"], **how)
    else:
        ours = canon_advantages(*rows, case["entropy"], **how)
    case.check("out_advantages", ours)


def aapo(case: Case) -> None:
    config, args = case.config, (case["rewards"], case["group"], case.mask, case["ref_rewards"])
    scaled = partial(aapo_advantages, eps=config["eps_std"])
    estimator = scaled if config["scale_rewards"] else aapo_unscaled_advantages
    advantages = estimator(*args, low=config["delta_low"], high=config["delta_high"])
    case.check("out_advantages", advantages)
    check_loss(case, lambda stats: reinforce_loss(stats, advantages))


def copo(case: Case) -> None:
    config, mask, rewards = case.config, case.mask, case["rewards"]
    args = rewards, case["group"], mask, case["answer_ids"]
    assert config["log_base"] == 2 and config["log_eps"] == 1e-8
    local = grpo_advantages(*args[:3], eps=config["eps"], singleton="raw")
    case.check("out_advantages", local)
    entropy, consistency = answer_entropy(*args), config["reward_coef_flg"]
    case.check("out_entropy", entropy)
    case.check("out_global_rewards", copo_global_rewards(*args, consistency=consistency))
    between = copo_global_advantages(*args, consistency=consistency, eps=config["eps"])
    case.check("out_global_advantages", between)
    soft, one = soft_blend(entropy, sharpness=config["k"], midpoint=config["b"]), torch.ones_like(entropy)
    weight = {
        "only-soft": soft,
        "soft-with-forced": where_local_speaks(soft, local, mask),
        "only-forced": where_local_speaks(one, local, mask),
        "soft-with-zero": where_rewarded(soft, rewards),
        "only-zero": where_rewarded(one, rewards),
        "only-global": 0 * one,
        "no-global": one,
    }[config["global_flg"]]
    case.check("out_token_weights", torch.where(mask, weight.unsqueeze(-1), 0.0))
    check_loss(case, lambda stats: copo_loss(
        stats, local, between, weight, clip_low=config["clip_low"], clip_high=config["clip_high"],
        dual_clip=config["clip_ratio_c"], aggregation=AGGREGATION[config["agg"]],
    ))  # fmt: skip


def ha_dw(case: Case) -> None:
    config = case.config
    if "batch_accuracy" in case:
        return ha_dw_anchors(case)
    rewards, group, mask, anchor = case["rewards"], case["group"], case.mask, case["anchor"]
    raw = config["single_row"] == "mean 0, std 1"
    how = {"scale": config["lambda_scale"], "singleton": "raw" if raw else "zero"}
    scaled = partial(grpo_advantages, eps=config["eps"])
    estimator = scaled if config["norm_std"] else dr_grpo_advantages
    base = estimator(rewards, group, mask, singleton=how["singleton"])
    if "history" in case:  # the released code: a window of batch accuracies with this one last
        hard, window = HardAnchor(10), [x for x in case["history"].tolist() if x == x]
        anchors = [hard.update(accuracy) for accuracy in window or [batch_accuracy(rewards)]]
        near(torch.tensor(anchors[-1], dtype=torch.float64), anchor)
        shaped = ha_dw_advantages(base, mask, rewards, group, anchor, **how) if config["norm_std"] else base
        case.check("out_advantages", shaped)
        return None
    case.check("out_advantages", ha_dw_advantages(base, mask, rewards, group, anchor, **how))
    weights = ha_dw_weights(base, mask, rewards, group, anchor, **how)
    case.check("out_sequence_weights", weights.gather(-1, mask.long().argmax(-1, keepdim=True)).squeeze(-1))
    return None


def ha_dw_anchors(case: Case) -> None:
    config = case.config
    hard, soft = HardAnchor(config["hard_window"]), SoftAnchor(config["eta"], config["m"], config["C0"])
    assert config["clip_eta"] == [0, 1]
    columns: dict[str, list[float]] = {n: [] for n in ("out_eta", "out_prior", "out_posterior", "out_hard_window10")}
    for accuracy in case["batch_accuracy"].tolist():
        columns["out_eta"].append(soft.rate())
        columns["out_prior"].append(soft.update(accuracy))
        columns["out_posterior"].append(soft.belief)
        columns["out_hard_window10"].append(hard.update(accuracy))
    for name, values in columns.items():
        case.check(name, torch.tensor(values, dtype=torch.float64))


def neg_gradient(case: Case) -> None:
    config, mask = case.config, case.mask
    assert config["norm_by_std"]
    base = grpo_advantages(case["rewards"], case["group"], mask, singleton="raw")
    near(base, case["advantages"])
    advantages = negative_advantages(base, mask)
    case.check("out_advantages", advantages)
    loss = {"GRPO-N": partial(ppo_clip_loss, dual_clip=3.0), "GSPO-N": gspo_loss}[config["kind"]]
    counted = negative_tokens(base, mask) if config["denominator"] == "negatives" else mask
    check_loss(case, lambda stats: loss(
        stats, advantages, clip_low=config["clip_low"], clip_high=config["clip_high"],
        aggregation=AGGREGATION[config["loss_agg"]],
    ), mask=counted)  # fmt: skip


ADAPTERS: dict[str, Callable[[Case], None]] = {
    "a3po": a3po,
    "aapo": aapo,
    "canon": canon,
    "copo": copo,
    "dr_grpo": dr_grpo,
    "grpo": grpo,
    "ha_dw": ha_dw,
    "ktae": ktae,
    "neg_gradient": neg_gradient,
    "reinforce_plus_plus": reinforce_plus_plus,
    "rloo": rloo,
    "spo_chain": spo_chain,
    "spo_tree": spo_tree,
    "tempo": tempo,
    "trl_grpo": trl_grpo,
}
