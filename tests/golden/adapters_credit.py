"""Golden vectors of credit: redistributors, advantages from token rewards, and the models that score tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from cases import Case

from tokenpo import masked
from tokenpo.advantages import matchtir_released_advantages
from tokenpo.credit import (
    abc_d_last_rewards,
    abc_d_last_weights,
    abc_d_rewards,
    abc_d_weights,
    abc_rewards,
    abc_weights,
    absolute_shape,
    all_coalitions,
    blend_shapes,
    call_similarity,
    centred_group_advantages,
    edit_operations,
    edit_rewards,
    entropy_segments,
    exact_shapley,
    explainable_rewards,
    fuse_levels,
    gae,
    greedy_matching,
    implicit_rewards,
    last_token_rewards,
    last_token_shape,
    lime_attribution,
    lime_kernel,
    matched_rewards,
    mean_dual_level_advantages,
    mqm_score,
    normalised_segment_values,
    optimal_matching,
    potential_shaping,
    prime_rewards,
    prime_whole_rewards,
    red_full_rewards,
    red_rewards,
    red_two_model_rewards,
    red_zero_rewards,
    released_prime_returns,
    repeat_in_segments,
    scaled_by_return,
    segment_rewards,
    shaping_terms,
    softmax_shape,
    span_rewards,
    subtract_kl,
    transport_plan,
    transported_rewards,
    turn_advantages,
    turn_index,
    turn_rewards_at_ends,
    uniform_rewards,
    whole_segment,
    worst_span_rewards,
)
from tokenpo.reward_models import (
    bin_by_position,
    fit_location_normaliser,
    implicit_prm_loss,
    least_squares_location_normaliser,
    segment_preference_loss,
    token_class_loss,
)
from tokenpo.statistics import dense_token_stats
from tokenpo.types import TokenStats


def redistributors_basic(case: Case) -> None:
    rewards, mask, beta, gamma = case["rewards"], case.mask, case.config["beta"], case.config["gamma"]
    assert case.config["terminal_potential"] == 0.0
    last = last_token_rewards(rewards, mask)
    potentials = case["potentials"][:, :-1]
    case.check("out_last_token", last)
    case.check("out_last_token_kl", subtract_kl(last, case["logps"], case["ref_logps"], mask, beta=beta))
    case.check("out_uniform", uniform_rewards(rewards, mask))
    case.check("out_implicit_dpo", implicit_rewards(case["logps"], case["ref_logps"], mask, beta=beta))
    case.check("out_shaping", shaping_terms(potentials, mask, gamma=gamma))
    case.check("out_shaped", potential_shaping(last, potentials, mask, gamma=gamma))


def gae_case(case: Case) -> None:
    config, mask = case.config, case.mask
    raw, returns = gae(case["token_rewards"], case["values"], mask, gamma=config["gamma"], lam=config["lam"])
    case.check("out_advantages_raw", raw)
    case.check("out_returns", returns)
    case.check("out_advantages", masked.whiten(raw, mask) if config["whiten"] else raw)


def red(case: Case) -> None:
    config, mask = case.config, case.mask
    values, beta_c = case["prefix_values"], config["beta_c"]
    if "cost_prefix_values" in case:
        assert config["first_token"] == "diff"
        rewards = red_two_model_rewards(values, case["cost_prefix_values"], mask, beta_c=beta_c, alpha=config["alpha"])
    else:
        variant = {"diff": red_rewards, "full": red_full_rewards, "zero": red_zero_rewards}[config["first_token"]]
        rewards = variant(values, mask, beta_c=beta_c)
        case.check("out_token_rewards_raw", variant(values, mask, beta_c=1.0))
        case.check("out_token_rewards_no_kl", rewards)
    with_kl = subtract_kl(rewards, case["logps"], case["ref_logps"], mask, beta=config["beta"])
    case.check("out_token_rewards", with_kl)


def abc(case: Case) -> None:
    rewards, mask, beta = case["rewards"], case.mask, case.config["beta"]
    positions = case["prompt_len"].unsqueeze(-1) + torch.arange(mask.shape[1])
    if "attentions" in case:
        case.check("out_token_weights", abc_weights(case["attentions"], positions, mask))
        case.check("out_token_rewards", abc_rewards(rewards, case["attentions"], positions, mask, beta=beta))
        return
    steps = case["gen_attentions"]
    last_only = case.config["last_only"]
    weights, credit = (abc_d_last_weights, abc_d_last_rewards) if last_only else (abc_d_weights, abc_d_rewards)
    case.check("out_token_weights", weights(steps, positions, mask, shift=1))
    case.check("out_token_rewards", credit(rewards, steps, positions, mask, beta=beta, shift=1))


def explainable_dense(case: Case) -> None:
    config = case.config
    assert config["components"] == ["shapley", "lime", "last_token"]
    kernel = lime_kernel(case["lime_masks"], sigma=config["sigma"])
    torch.testing.assert_close(kernel, case["lime_kernel"], rtol=1e-9, atol=1e-12)
    shapley = exact_shapley(case["coalition_rewards"])
    lime, intercept = lime_attribution(case["lime_masks"], case["lime_rewards"], kernel, ridge=config["ridge"])
    case.check("out_shapley", shapley)
    case.check("out_lime", lime)
    case.check("out_lime_intercept", intercept)
    assert len(all_coalitions(len(shapley))) == len(case["coalition_rewards"])
    mask, reward = torch.ones(1, len(shapley), dtype=torch.bool), case["rewards"].reshape(1)
    shape = {"softmax": softmax_shape, "abs": absolute_shape}[config["normalizer"]]
    shapes = [shape(shapley[None], mask), shape(lime[None], mask), last_token_shape(mask)]
    case.check("out_token_weights", torch.cat([s.double() for s in shapes]))
    case.check("out_token_rewards", blend_shapes(reward, shapes, case["weights"], mask)[0])
    if config["normalizer"] == "softmax":
        w = case["weights"].tolist()
        ours = explainable_rewards(reward, shapley[None], lime[None], mask, shapley_weight=w[0], lime_weight=w[1])
        torch.testing.assert_close(ours[0], case["out_token_rewards"], rtol=1e-9, atol=1e-12)


def fine_grained_supervision(case: Case) -> None:
    config, tokens, mask = case.config, case["tokens"], case.mask
    assert config["ops"] == {"U": 0, "S": 1, "D": 2, "A": 3}
    pairs = len(tokens) // 2
    edited, original = slice(0, pairs), slice(pairs, None)
    of_original, of_edited = edit_operations(tokens[original], tokens[edited], mask[original], mask[edited])
    case.check("out_edit_ops", torch.cat([of_edited, of_original]))
    other = torch.cat([tokens[original], tokens[edited]]), torch.cat([mask[original], mask[edited]])
    rewards = edit_rewards(
        tokens, other[0], torch.arange(2 * pairs) < pairs, mask, other[1], edited=config["reward_edited"],
        original=config["reward_original"], unchanged=config["reward_unchanged"],
    )  # fmt: skip
    case.check("out_token_rewards", rewards)
    logits = case.leaf("logits")
    out = token_class_loss(logits[edited], logits[original], of_edited, of_original)
    case.check("out_loss", out.loss)
    case.check("grad_logits", torch.autograd.grad(out.loss, logits)[0])


def mt_severity(case: Case) -> None:
    config = case.config
    weights = {name.lower(): value for name, value in config["severity_weights"].items()}
    overlap = {"any_overlap": 0.0, "majority_overlap": config["majority_threshold"]}[config["overlap_policy"]]
    variant = {"sum": span_rewards, "min": worst_span_rewards}[config["combine"]]
    confidence = case["span_confidence"] if config["use_confidence"] else None
    rewards = variant(
        case["token_offsets"], case["spans"], case.mask, confidence, least_overlap=overlap, **weights
    )  # fmt: skip
    case.check("out_token_rewards", rewards)
    case.check("out_mqm_score", mqm_score(case["spans"]), rtol=1e-6)


def matchtir(case: Case) -> None:
    if "mask" in case:
        return matchtir_advantages(case)
    config, similarity = case.config, case["similarity"]
    if "predicted" in config:
        torch.testing.assert_close(call_similarity(config["predicted"], config["golden"]), similarity)
    greedy, unmatched = greedy_matching(similarity), config["unmatched_penalty"]
    case.check("out_assignment", greedy)
    case.check("out_rewards_hard", matched_rewards(similarity, greedy, unmatched=unmatched))
    optimal = optimal_matching(similarity)
    best = matched_rewards(similarity, optimal)
    case.check("out_optimal_total", best.sum())
    ours = matched_rewards(similarity, optimal, unmatched=unmatched)
    expected = case["out_rewards_hard_optimal"]
    if not torch.allclose(ours, expected):  # another matching of the same greatest total
        torch.testing.assert_close(ours.clamp(min=0).sum(), expected.clamp(min=0).sum())
    case.compared.add("out_rewards_hard_optimal")
    plan = transport_plan(similarity, regularisation=config["reg"])
    case.check("out_transport_plan", plan, rtol=0.0, atol=1e-5)
    case.check("out_rewards_soft", transported_rewards(similarity, plan), rtol=0.0, atol=1e-5)
    return None


def matchtir_advantages(case: Case) -> None:
    config, mask, group = case.config, case.mask, case["group"]
    assert torch.equal(turn_index(mask), case["turn_ids"])
    turns = turn_index(mask)
    per_turn = torch.zeros(len(mask), int(turns.max()) + 1, dtype=torch.float64)
    per_turn.scatter_add_(-1, turns.clamp(min=0), torch.where(mask, case["token_rewards"], 0.0))
    placed = turn_rewards_at_ends(per_turn, mask)
    torch.testing.assert_close(placed, case["token_rewards"], rtol=0.0, atol=0.0)
    torch.testing.assert_close(placed.sum(-1), case["rewards"])
    assert config["combine"] == "mean"
    if config["norm_by_std"]:
        how = {"gamma": config["gamma_turn"], "eps": config["eps"]}
        ours = mean_dual_level_advantages(placed, group, mask, **how)
        named = matchtir_released_advantages(
            case["rewards"], group, mask, case["token_rewards"], singleton="raw", **how
        )
        case.check("out_advantages", named, atol=1e-9)
    else:
        turn = turn_advantages(placed, group, mask, gamma=config["gamma_turn"], eps=config["eps"])
        ours = 0.5 * fuse_levels(centred_group_advantages(placed.sum(-1), group), turn, mask)
    # Equal rewards leave rounding of 1e-16 divided by eps of 1e-6.
    case.check("out_advantages", ours, atol=1e-9)


def segment_reward(case: Case) -> None:
    if "segment_rewards" in case:
        return segment_fit(case)
    if "out_loss" in case:
        return segment_training(case)
    config, mask = case.config, case.mask
    threshold = config["entropy_threshold"]
    names = {"w_mean", "w_std", "b_mean", "b_std"}
    normaliser = config["normalizer"] or {}
    assert set(normaliser) in (names, set())
    segments = entropy_segments(case["entropy"], mask, threshold=threshold)
    case.check("out_segment_ids", segments)
    values = normalised_segment_values(case["rm_values"], segments, **normaliser)
    rewards = {
        "segment_normalization": segment_rewards(
            case["rm_values"], case["entropy"], mask, threshold=threshold, **normaliser
        ),
        "every_segment_last": values,
        "same_segment_last": repeat_in_segments(values, segments),
    }[config["reward_type"]]
    if "length_norm" in config["exp_prefix"]:
        rewards = rewards / masked.count(mask, -1).unsqueeze(-1)
    if "end_penalty" in config["exp_prefix"]:
        penalty = -float(config["exp_prefix"].split("_m")[-1].replace("d", "."))
        rewards = torch.where(case["eos_present"].bool().unsqueeze(-1), rewards, penalty)  # padding too, as released
    case.check("out_token_rewards", rewards)
    clamped = rewards.clamp(-config["reward_clamp"], config["reward_clamp"])
    with_kl = subtract_kl(clamped, case["logps"], case["ref_logps"], mask, beta=config["kl_coef"])
    case.check("out_token_rewards_with_kl", with_kl)
    advantages, returns = gae(with_kl, case["values"], mask, gamma=config["gamma"], lam=config["lambd"])
    case.check("out_advantages", advantages)
    case.check("out_returns", returns)
    return None


def segment_training(case: Case) -> None:
    config, mask = case.config, case.mask
    entropy = dense_token_stats(
        case["logits"], torch.zeros(mask.shape, dtype=torch.long), mask, outputs=("logps", "entropy")
    ).entropy
    torch.testing.assert_close(masked.select(entropy, mask), masked.select(case["entropy"], mask))
    threshold = config["entropy_threshold"]
    segments = whole_segment(mask) if threshold == 1000 else entropy_segments(entropy, mask, threshold=threshold)
    values = case.leaf("rm_values")
    pairs = len(values) // 2
    margin = case.tensors.get("margin")
    out = segment_preference_loss(values[:pairs], values[pairs:], segments[:pairs], segments[pairs:], margin)
    assert config["agg"] == "avg" and config["loss"] == "sigmoid"
    case.check("out_loss", out.loss)
    case.check("out_scores", torch.cat([side.sum(-1) for side in out.per_token]))
    case.check("grad_rm_values", torch.autograd.grad(out.loss, values)[0])


def segment_fit(case: Case) -> None:
    inputs = case["segment_rewards"], case["segment_index"], case["segment_count"]
    positions, means, stds = bin_by_position(*inputs)
    case.check("out_bin_positions", positions)
    case.check("out_bin_mean", means)
    case.check("out_bin_std", stds)
    assert case.config["order"] == ["w_mean", "w_std", "b_mean", "b_std"]
    case.check("out_params_ols", torch.tensor(least_squares_location_normaliser(*inputs), dtype=torch.float64))
    huber = torch.tensor(fit_location_normaliser(*inputs), dtype=torch.float64)
    case.check("out_params_huber", huber, rtol=1e-3)


def implicit_prm(case: Case) -> None:
    config, mask = case.config, case.mask
    beta = config["beta_train"]
    variant = {"token": prime_rewards, "whole": prime_whole_rewards}[config["granularity"]]
    released = variant(case["logps"], case["ref_logps"], mask, beta=1.0)  # the released code leaves beta out
    case.check("out_token_rewards", released)
    scaled = scaled_by_return(released, mask) if config["norm"] == "batch_norm" else released
    case.check("out_token_rewards_norm", scaled)
    returns = released_prime_returns(
        scaled, case["acc"], case["group"], mask,
        process_gamma=config["reward_model_gamma"], outcome_gamma=config["verifier_gamma"],
    )  # fmt: skip
    case.check("out_returns", returns)
    case.check("out_advantages", masked.whiten(returns, mask))
    logps = case.leaf("logps")
    out = implicit_prm_loss(TokenStats(mask=mask, logps=logps, ref_logps=case["ref_logps"]), case["acc"], beta=beta)
    case.check("out_loss", out.loss)
    case.check("grad_logps", torch.autograd.grad(out.loss, logps)[0])


ADAPTERS: dict[str, Callable[[Case], None]] = {
    "abc": abc,
    "explainable_dense": explainable_dense,
    "fine_grained_supervision": fine_grained_supervision,
    "gae": gae_case,
    "implicit_prm": implicit_prm,
    "matchtir": matchtir,
    "mt_severity": mt_severity,
    "red": red,
    "redistributors_basic": redistributors_basic,
    "segment_reward": segment_reward,
}
