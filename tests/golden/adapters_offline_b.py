"""Adapters of the offline methods: T-REG, AlignDistil, BMC, RTO, r to Q*, MAPL, MEET, ORPO, KTO."""

from __future__ import annotations

from collections.abc import Callable

import torch
from cases import Case
from safetensors import safe_open

from tokenpo import masked
from tokenpo.credit import (
    bellman_rewards,
    contrastive_prompt_rewards,
    expected_implicit_rewards,
    extension_scores,
    implicit_rewards,
    modified_positions,
    modified_tokens,
    rto_last_rewards,
    rto_rewards,
    rto_segment_rewards,
    rto_shaped_rewards,
    search_scores,
    soft_q_values,
    soft_values,
)
from tokenpo.credit.gae import gae
from tokenpo.losses import (
    adaptive_strength,
    aligndistil_constant_loss,
    aligndistil_loss,
    aligndistil_theorem1_loss,
    bmc_ipo_loss,
    bmc_loss,
    bmc_own_weights_loss,
    confidence_weights,
    distillation_loss,
    dpo_loss,
    extrapolate,
    kto_loss,
    mapl_intra_loss,
    meet_loss,
    mismatched_kl,
    orpo_loss,
    ppo_clip_loss,
    reverse_kl,
    simpo_loss,
    t_reg_loss,
    t_reg_simpo_loss,
    t_reg_static_loss,
    value_loss,
)
from tokenpo.statistics import dense_token_stats
from tokenpo.types import LossOutput, TokenStats


def halves(stats: TokenStats) -> tuple[TokenStats, TokenStats]:
    """Rows 0..P-1 are chosen, P..2P-1 rejected."""
    pairs = len(stats.mask) // 2
    return stats[:pairs], stats[pairs:]


def check_grad(case: Case, loss: torch.Tensor, leaf: torch.Tensor, name: str = "grad_logps") -> None:
    case.check(name, torch.autograd.grad(loss, leaf)[0])


def t_reg(case: Case) -> None:
    config = case.config
    logps, mask = case.leaf("logps"), case.mask
    rewards = contrastive_prompt_rewards(case["better_logps"], case["worse_logps"], mask)
    case.check("out_token_rewards", rewards)
    stats = TokenStats(mask=mask, logps=logps, ref_logps=case["ref_logps"], token_rewards=rewards)
    chosen, rejected = halves(stats)
    hyper = {"beta": config["beta"], "alpha": config["alpha"]}
    if config["base"] == "simpo":
        assert config["weighting"] == "dynamic"
        function, base, hyper["gamma"] = t_reg_simpo_loss, simpo_loss, config["gamma"]
    else:
        function = {"dynamic": t_reg_loss, "static": t_reg_static_loss}[config["weighting"]]
        base = dpo_loss
    out = function(chosen, rejected, **hyper)
    case.check("out_loss", out.loss)
    check_grad(case, out.loss, logps)
    case.check("out_base_losses", base(chosen, rejected, **{k: v for k, v in hyper.items() if k != "alpha"}).per_pair)
    # Metrics are means over pairs: of single pairs they are the pairs' own values.
    single = [function(chosen[p : p + 1], rejected[p : p + 1], **hyper).metrics for p in range(len(chosen.mask))]
    weights = torch.stack([m["pairs/regularizer_weight"] for m in single])
    case.check("out_seq_weights", weights)
    case.check("out_reg_losses", weights * torch.stack([m["pairs/regularizer"] for m in single]))


def aligndistil(case: Case) -> None:
    config, mask = case.config, case.mask
    leaf = case.leaf("logits")
    logits, dpo, other = leaf[mask], case["dpo_logits"][mask], case["rdpo_logits"][mask]
    beta, beta2, temperature = config["beta"], config["beta2"], config["kd_temperature"]
    kind = config["reward_boost_type"]
    if kind.startswith("theorem1") and kind != "theorem1_adaptive":
        strength = torch.tensor(beta / beta2, dtype=logits.dtype)
    else:
        strength = adaptive_strength(dpo, other, r=beta2)
    teacher = extrapolate(other if kind in ("theorem1", "theorem1_adaptive") else dpo, dpo, other, strength)
    # The off-policy code leaves the student's logits untempered.
    with safe_open(case.path, framework="pt") as file:
        off_policy = "offpolicy" in file.metadata()["source"]
    student_temperature = 1.0 if off_policy else temperature
    token_losses = beta / strength * reverse_kl(logits / student_temperature, teacher / temperature)
    how = "row_mean_of_means" if config["reward_len_norm"] else "row_mean_of_sums"
    out = distillation_loss(token_losses, mask, aggregation=how)
    case.check("out_loss", out.loss)
    case.check("out_token_loss", out.per_token[0])
    check_grad(case, out.loss, leaf, "grad_logits")

    def rows(values: torch.Tensor, name: str) -> torch.Tensor:
        """Ours where the mask counts; the file's own values elsewhere, which mean nothing."""
        expected = case[name]
        where = mask.reshape(*mask.shape, *[1] * (expected.dim() - 2)).expand_as(expected)
        return expected.masked_scatter(where, values)

    weights = strength if strength.dim() == 0 else rows(strength, "out_token_weights")
    case.check("out_token_weights", weights)
    case.check("out_teacher_logps", rows((teacher / temperature).log_softmax(-1), "out_teacher_logps"))
    taken = [dense_token_stats(case[f"{name}_logits"], case["tokens"], mask).logps for name in ("dpo", "rdpo")]
    case.check("out_token_rewards", implicit_rewards(*taken, mask, beta=beta))
    # The losses as methods, where they are what the released code ran.
    if student_temperature == temperature and config["reward_len_norm"]:
        whole = {
            "aligndistil": lambda: aligndistil_loss(logits, dpo, other, mask, beta=beta, r=beta2),
            "theorem1": lambda: aligndistil_theorem1_loss(logits, dpo, other, mask, beta=beta, kl_coef=beta2),
            "theorem1_contrast": lambda: aligndistil_constant_loss(logits, dpo, other, mask, beta=beta, kl_coef=beta2),
        }
        if kind in whole:
            case.check("out_loss", whole[kind]().loss)


def bmc(case: Case) -> None:
    if "tokens_full" not in case:
        return bmc_marks_only(case)
    config, mask = case.config, case.mask
    logps, modified, delta = case.leaf("logps"), case["diff_mask"], config["delta"]
    pairs = len(mask) // 2
    for p in range(pairs):
        chosen_ids, rejected_ids = (case["tokens_full"][row].tolist() for row in (p, p + pairs))
        marks = modified_positions(rejected_ids, chosen_ids, ignore=config["stopword_ids"], autojunk=True)
        for row, found in ((p + pairs, marks[0]), (p, marks[1])):
            assert torch.equal(torch.tensor(found[1:]).double(), modified[row]), "the marks of the released code"
    stats = TokenStats(mask=mask, logps=logps, ref_logps=case["ref_logps"], token_weights=modified)
    chosen, rejected = halves(stats)
    paper = config["variant"] == "paper"
    ipo = config.get("loss_type") == "ipo"
    function = bmc_loss if paper else bmc_ipo_loss if ipo else bmc_own_weights_loss
    out = function(chosen, rejected, beta=config["beta"], delta=delta)
    case.check("out_loss", out.loss)
    case.check("out_pair_losses", out.per_pair)
    check_grad(case, out.loss, logps)
    weights = confidence_weights(logps, modified, mask, delta=delta)
    case.check("out_token_weights", weights)
    if paper:
        case.check("out_token_rewards", torch.cat(out.per_token))
        return None
    ref_weights = confidence_weights(case["ref_logps"], modified, mask, delta=delta)
    case.check("out_ref_token_weights", ref_weights)
    length = masked.count(mask, -1) if ipo else 1
    sums = (
        masked.sum(weights * logps, mask, -1) / length,
        masked.sum(ref_weights * case["ref_logps"], mask, -1) / length,
    )
    case.check("out_seq_logps", sums[0])
    case.check("out_ref_seq_logps", sums[1])
    terms = torch.cat(out.per_token).sum(-1) * (config["beta"] if ipo else 1.0)
    case.check("out_chosen_rewards", terms[:pairs])
    case.check("out_rejected_rewards", terms[pairs:])
    torch.testing.assert_close(out.metrics["rewards/chosen"], terms[:pairs].mean().detach())
    return None


def bmc_marks_only(case: Case) -> None:
    chosen, rejected = case["tokens_chosen"], case["tokens_rejected"]
    for suffix, autojunk in (("", True), ("_noautojunk", False)):
        hyper = {"ignore": case.config["stopword_ids"], "autojunk": autojunk}
        of_rejected, of_chosen = modified_positions(rejected.tolist(), chosen.tolist(), **hyper)
        case.check(f"out_diff_chosen{suffix}", torch.tensor(of_chosen))
        case.check(f"out_diff_rejected{suffix}", torch.tensor(of_rejected))
        everything = torch.ones(1, len(chosen), dtype=torch.bool), torch.ones(1, len(rejected), dtype=torch.bool)
        marks = modified_tokens(chosen[None], rejected[None], *everything, **hyper)
        assert marks[0][0].tolist() == of_chosen and marks[1][0].tolist() == of_rejected


def rto(case: Case) -> None:
    if "beta1" in case.config:
        return rto_paper(case)
    config, mask = case.config, case.mask
    # The released code reads a scale of 0 or less as 1, a clip of 0 or less as none, a KL coefficient below 0 as 0.
    scale = config["dpo_reward_scale"] if config["dpo_reward_scale"] > 0 else 1.0
    clip = config["dpo_reward_clip"] if config["dpo_reward_clip"] > 0 else None
    kl_coef = max(config["kl_coef"], 0.0)
    inputs = [case[name] for name in ("old_logps", "ref_logps", "dpo_logps", "rewards")]
    hyper = {"dpo_coef": scale, "dpo_clip": clip}
    rewards = rto_rewards(*inputs, mask, **hyper, kl_coef=kl_coef, reward_clip=10.0)
    case.check("out_token_rewards", rewards)
    case.check("out_dpo_token_rewards", rto_rewards(*inputs, mask, **hyper, kl_coef=0.0, reward_coef=0.0))
    case.check("out_kl", -rto_rewards(*inputs, mask, dpo_coef=0.0, kl_coef=1.0, reward_coef=0.0))
    advantages, returns = gae(rewards, case["values"], mask, gamma=config["gamma"], lam=config["lambd"])
    case.check("out_advantages_raw", advantages)
    case.check("out_returns", returns)
    deviation = masked.var(advantages, mask, unbiased=False).clamp(min=1e-8).sqrt()
    white = masked.select((advantages - masked.mean(advantages, mask)) / deviation, mask)
    case.check("out_advantages", white)
    logps, values = case.leaf("logps"), case.leaf("new_values")
    stats, eps = TokenStats(mask=mask, logps=logps, old_logps=case["old_logps"]), config["eps_clip"]
    clips = {"clip_low": eps, "clip_high": eps, "dual_clip": None}
    loss = ppo_clip_loss(stats, white, **clips, aggregation="row_mean_of_means").loss
    case.check("out_loss", loss)
    check_grad(case, loss, logps)
    critic = value_loss(
        values, case["values"], returns, mask, clip=config["value_clip"], aggregation="row_mean_of_means"
    ).loss
    case.check("out_value_loss", critic)
    check_grad(case, critic, values, "grad_new_values")
    return None


def rto_paper(case: Case) -> None:
    config, mask = case.config, case.mask
    inputs = [case[name] for name in ("old_logps", "ref_logps", "dpo_logps", "rewards")]
    hyper = {"dpo_coef": config["beta1"], "kl_coef": config["beta2"], "reward_coef": config["beta3"]}
    case.check("out_token_rewards", rto_rewards(*inputs, mask, **hyper))
    case.check("out_token_rewards_ddpo", rto_last_rewards(*inputs, mask, **hyper))
    segments = rto_segment_rewards(*inputs, mask, case["segment_end"].bool(), **hyper)
    case.check("out_token_rewards_semi", segments)
    case.check("out_token_rewards_rs", rto_shaped_rewards(*inputs, mask, **hyper))


def q_star(case: Case) -> None:
    beta, mask = case.config["beta"], case.mask
    logits = case.leaf("logits")
    stats = dense_token_stats(logits, case["tokens"], mask, ref_logits=case["ref_logits"], outputs=("logps", "ref_kl"))
    for name in ("logps", "ref_logps"):
        torch.testing.assert_close(getattr(stats, name)[mask], case[name][mask], rtol=1e-9, atol=1e-12)
    out = dpo_loss(*halves(stats), beta=beta)
    case.check("out_loss", out.loss)
    case.check("out_pair_losses", out.per_pair)
    check_grad(case, out.loss, logits, "grad_logits")
    case.check("out_token_rewards", implicit_rewards(stats.logps, stats.ref_logps, mask, beta=beta))
    values = soft_values(logits, beta=beta)
    case.check("out_v", masked.select(values, mask))
    case.check("out_q", masked.select(soft_q_values(logits, case["tokens"], beta=beta), mask))
    case.check("out_bellman_rewards", bellman_rewards(stats.logps, stats.ref_logps, values, mask, beta=beta))
    scores = search_scores(stats.logps, mask, beta=beta)
    case.check("out_search_scores", scores)
    case.check("out_expected_rewards", expected_implicit_rewards(stats.ref_kl, mask, beta=beta))
    # The same scores a step at a time, as a beam search meets them.
    running = torch.zeros(len(mask), dtype=logits.dtype)
    for t in range(mask.shape[1]):
        extended = extension_scores(running, logits[:, t], beta=beta).gather(-1, case["tokens"][:, t, None])[:, 0]
        running = torch.where(mask[:, t], extended, running)
        torch.testing.assert_close(running[mask[:, t]], scores[:, t][mask[:, t]], rtol=1e-9, atol=1e-12)


def mapl(case: Case) -> None:
    logps = case.leaf("logps")
    better, worse = halves(TokenStats(mask=case.mask, logps=logps, ref_logps=case["ref_logps"]))
    hyper = {"beta": case.config["beta"], "rejected_weight": case.config["lam"]}
    out = mapl_intra_loss(better, worse, case["kind"] == 1, **hyper)
    case.check("out_loss", out.loss)
    case.check("out_pair_losses", out.per_pair)
    check_grad(case, out.loss, logps)


def meet(case: Case) -> None:
    assert case.config["reduction"] == "token_mean"
    logps, mask = case.leaf("logps"), case.mask
    loss = masked.aggregate(-logps, mask, "token_mean")
    case.check("out_loss", loss)
    case.check("out_row_nll", masked.sum(-logps, mask, -1))
    stats, good = TokenStats(mask=mask, logps=logps), case["control"] == 0
    case.check("out_loss", meet_loss(stats[good], stats[~good]).loss)
    check_grad(case, loss, logps)


def orpo(case: Case) -> None:
    logps, beta = case.leaf("logps"), case.config["beta"]
    stats = TokenStats(mask=case.mask, logps=logps)
    chosen, rejected = stats[case["chosen_rows"]], stats[case["rejected_rows"]]
    out = orpo_loss(chosen, rejected, beta=beta)
    case.check("out_loss", out.loss)
    case.check("out_nll", out.sums["chosen_tokens"] / chosen.mask.sum())
    case.check("out_odds_term", out.per_pair)
    check_grad(case, out.loss, logps)


def kto(case: Case) -> None:
    logps = case.leaf("logps")
    stats = TokenStats(mask=case.mask, logps=logps, ref_logps=case["ref_logps"])
    one = torch.ones(len(case["kl_logps"]), 1, dtype=torch.bool)
    mismatched = TokenStats(mask=one, logps=case["kl_logps"][:, None], ref_logps=case["kl_ref_logps"][:, None])
    out: LossOutput = kto_loss(stats, case["label"] == 1, mismatched_kl(mismatched), **case.config)
    case.check("out_loss", out.loss)
    case.check("out_kl", out.metrics["kl/reference_point"])
    check_grad(case, out.loss, logps)


ADAPTERS: dict[str, Callable[[Case], None]] = {
    "aligndistil": aligndistil,
    "bmc": bmc,
    "kto": kto,
    "mapl": mapl,
    "meet": meet,
    "orpo": orpo,
    "q_star": q_star,
    "rto": rto,
    "t_reg": t_reg,
}
