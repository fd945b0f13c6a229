"""Our functions under verl's own: `compute_advantage`, the loss registry, `agg_loss`, composed configurations.

verl wants another transformers than the rest of this library, so these tests have an environment of their own and the
main run does not collect them: `make test-verl` builds .venv-verl and runs this folder. CPU only; what needs Ray
workers, engines or GPUs is not run here.
"""

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transfer_queue
import verl.trainer.ppo.core_algos as core
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl.protocol import DataProto
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import ActorConfig

from tokenpo import methods
from tokenpo.advantages import HADW, d3s_rows, grpo_advantages, value_targets
from tokenpo.advantages import compose as compose_advantages
from tokenpo.errors import InputError, MissingInputError
from tokenpo.integrations.verl.__main__ import listed, main, verify
from tokenpo.integrations.verl.check import TARGET, check, run_composition
from tokenpo.integrations.verl.config import AlgoConfig, PolicyLossConfig
from tokenpo.integrations.verl.fields import AGGREGATIONS, LIST, PREFIX, Step, during
from tokenpo.integrations.verl.functions import registered
from tokenpo.integrations.verl.trainer import STATE, TokenpoTrainer
from tokenpo.types import TokenStats

ESTIMATORS, OBJECTIVES = registered()
NAMED = [name for name in ESTIMATORS if name != LIST]
G = torch.Generator().manual_seed(0)
LENGTHS = torch.tensor([5, 3, 6, 2, 4, 4])
MASK = torch.arange(6) < LENGTHS.unsqueeze(-1)
REWARDS = torch.tensor([1.0, 0.0, 1.0, 0.25, 1.0, 0.5], dtype=torch.float64)
UIDS = np.array(["b7", "a0", "b7", "a0", "b7", "a0"], dtype=object)
GROUP = torch.tensor([1, 0, 1, 0, 1, 0])


def values(scale=1.0):
    return torch.rand(6, 6, generator=G, dtype=torch.float64) * scale


SCORES = torch.zeros(6, 6, dtype=torch.float64)
SCORES[torch.arange(6), LENGTHS - 1] = REWARDS
COLUMNS = {
    "old_logps": -values(),
    "entropy": values(),
    "values": values(),
    "tokens": torch.randint(4, (6, 6), generator=G),
}
INPUTS = {"rewards": REWARDS, "group": GROUP, "mask": MASK, "token_rewards": SCORES, "step": 40, **COLUMNS}


def data(dtype=torch.float64):
    columns = {"token_level_rewards": SCORES.to(dtype), "response_mask": MASK.long()}
    return DataProto(batch=TensorDict(columns, batch_size=6), non_tensor_batch={"uid": UIDS})


def run(name, node=None, **algorithm):
    config = OmegaConf.create({"adv_estimator": name, "gamma": 1.0, "lam": 1.0, "tokenpo": node, **algorithm})
    batch = compute_advantage(data(), adv_estimator=name, config=config).batch
    return batch["advantages"], batch["returns"]


def pure(name, **hyperparameters):
    function = methods.get(name.removeprefix(PREFIX), "estimator").function
    arguments = inspect.signature(function).parameters.values()
    given = [p.name for p in arguments if p.kind is p.POSITIONAL_OR_KEYWORD]
    return function(**{key: INPUTS[key] for key in given}, **hyperparameters)


def test_import_verl_registers_everything():
    verify()
    assert len(NAMED) >= 20 and len(OBJECTIVES) >= 8
    assert core.get_adv_estimator_fn("tokenpo_ktae") is ESTIMATORS["tokenpo_ktae"]
    assert core.get_policy_loss_fn("tokenpo_gspo") is OBJECTIVES["tokenpo_gspo"]
    assert get_trainer_cls("tokenpo") is TokenpoTrainer
    assert any(line.split()[:2] == ["trainer", "tokenpo"] and line.endswith(" registered") for line in listed())


@pytest.mark.parametrize("name", NAMED)
def test_estimators_are_the_pure_functions(name):
    composition = compose_advantages([name.removeprefix(PREFIX)])
    if set(composition.needs) <= {"token_rewards"}:
        advantages, returns = run(name)
    else:
        with pytest.raises(MissingInputError, match="trainer_mode=tokenpo"):
            run(name)
        with during(Step(composition, {**COLUMNS, "step": 40})):
            advantages, returns = run(name)
    expected = pure(name)
    assert expected.abs().max() > 0
    torch.testing.assert_close(advantages, expected, rtol=0, atol=1e-12)
    if "values" not in composition.needs:
        assert torch.equal(returns, advantages)


def test_float32_stays_float32():
    batch = compute_advantage(data(torch.float32), "tokenpo_grpo", config=OmegaConf.create({})).batch
    torch.testing.assert_close(batch["advantages"], grpo_advantages(REWARDS.float(), GROUP, MASK), rtol=0, atol=1e-6)
    assert batch["advantages"].dtype == torch.float32


def test_hyperparameters_and_lists_from_the_configuration():
    torch.testing.assert_close(run("tokenpo_grpo", {"eps": 0.5})[0], grpo_advantages(REWARDS, GROUP, MASK, eps=0.5))
    listed_ = run("tokenpo", [{"name": "grpo", "eps": 0.5}, "negative_only"])[0]
    assert torch.equal(listed_, run("tokenpo_grpo", {"eps": 0.5})[0].clamp(max=0))
    with pytest.raises(InputError, match="'epsilon'"):
        run("tokenpo_grpo", {"epsilon": 0.5})
    with pytest.raises(InputError, match=r"algorithm\.lam=0\.9"):
        run("tokenpo_grpo", lam=0.9)


@pytest.mark.parametrize(("name", "lam"), [("tokenpo_ppo_gae", 0.95), ("tokenpo_vapo", 1.0)])
def test_returns_are_what_the_critic_learns(name, lam):
    with during(Step(compose_advantages([name.removeprefix(PREFIX)]), COLUMNS)):
        returns = run(name)[1]
    torch.testing.assert_close(returns, value_targets(REWARDS, MASK, COLUMNS["values"], lam=lam), rtol=0, atol=1e-12)


OLD = -values()
NEW = OLD + values(0.6) - 0.3
ADVANTAGES = values(2.0) - 1
WEIGHTS = values() + 0.5
DIVISORS = {"tokens": 40, "rows": 10, "nonempty_rows": 10, "once": 1}


def verls_loss(name, mode, info, node=None, weights=None):
    logps = NEW.clone().requires_grad_()
    config = SimpleNamespace(global_batch_info=info, policy_loss=SimpleNamespace(tokenpo=node))
    loss, metrics = core.get_policy_loss_fn(name)(
        old_log_prob=OLD, log_prob=logps, advantages=ADVANTAGES, response_mask=MASK, loss_agg_mode=mode, config=config,
        rollout_is_weights=weights,
    )  # fmt: skip
    loss.backward()
    return loss.detach(), logps.grad, metrics


@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_are_the_pure_functions_over_verls_aggregation(name, mode):
    method = methods.get(name.removeprefix(PREFIX), "policy_gradient")
    hyperparameters = {"aggregation": AGGREGATIONS[mode], "length": 8.0} if "aggregation" in method.defaults else {}
    if not hyperparameters and mode != "token-mean":
        hyperparameters = None
    info = {"dp_size": 4, "batch_num_tokens": 40, "global_batch_size": 10, "loss_scale_factor": 8}
    loss, gradient, metrics = verls_loss(name, mode, info, weights=WEIGHTS)
    assert metrics and all(isinstance(v, float) and k.startswith("actor/tokenpo/") for k, v in metrics.items())
    if hyperparameters is None:  # dapo, which is ppo_clip with other ranges
        method, hyperparameters = methods.get("ppo_clip"), {
            "clip_high": 0.28, "dual_clip": 10.0, "aggregation": AGGREGATIONS[mode], "length": 8.0,
        }  # fmt: skip
    logps = NEW.clone().requires_grad_()
    stats = TokenStats(mask=MASK, logps=logps, old_logps=OLD, token_weights=WEIGHTS)
    out = method.function(stats, ADVANTAGES, **hyperparameters)
    ((unit, total),) = out.sums.items()
    expected = total / DIVISORS[unit] * 4
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-8, atol=0)
    torch.testing.assert_close(gradient, logps.grad, rtol=1e-8, atol=1e-15)


@pytest.mark.parametrize("mode", [mode for mode in AGGREGATIONS if mode != "seq-mean-token-sum-norm"])
def test_without_global_counts_the_loss_is_that_of_the_batch(mode):
    stats = TokenStats(mask=MASK, logps=NEW, old_logps=OLD)
    expected = methods.get("ppo_clip").function(stats, ADVANTAGES, aggregation=AGGREGATIONS[mode]).loss
    torch.testing.assert_close(verls_loss("tokenpo_ppo_clip", mode, {})[0], expected, rtol=1e-8, atol=0)


def test_ppo_clip_is_verls_vanilla():
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    given = (OLD, NEW, ADVANTAGES * 5, MASK, "seq-mean-token-sum", config)
    vanilla = core.get_policy_loss_fn("vanilla")(*given)[0]
    torch.testing.assert_close(core.get_policy_loss_fn("tokenpo_ppo_clip")(*given)[0], vanilla, rtol=1e-12, atol=0)


def test_padding_may_hold_anything():
    broken = torch.where(MASK, NEW, torch.nan).requires_grad_()
    config = SimpleNamespace(global_batch_info={}, policy_loss=None)
    loss = core.get_policy_loss_fn("tokenpo_gspo")(
        torch.where(MASK, OLD, torch.inf), broken, torch.where(MASK, ADVANTAGES, torch.nan), MASK.long(), config=config
    )[0]
    loss.backward()
    torch.testing.assert_close(loss.detach(), verls_loss("tokenpo_gspo", "token-mean", {})[0])
    assert torch.equal(broken.grad[~MASK], torch.zeros(int((~MASK).sum()), dtype=torch.float64))


LOSS = "actor_rollout_ref.actor.policy_loss"
OURS = [f"{LOSS}.loss_mode=tokenpo_ppo_clip", f"{LOSS}._target_={TARGET}", f"+{LOSS}.tokenpo.clip_high=0.28"]
TRAINER = "trainer.v1.trainer_mode=tokenpo"
ACTOR = "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1"


def configured(*overrides):
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=[ACTOR, *overrides])


def test_hyperparameters_reach_the_loss_through_verls_configuration():
    config = configured("algorithm.adv_estimator=tokenpo_grpo", "+algorithm.tokenpo.eps=1e-4", *OURS)
    assert [line.split(":")[0] for line in check(config)] == [
        "estimator tokenpo_grpo",
        "objective tokenpo_ppo_clip",
    ]
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert isinstance(actor.policy_loss, PolicyLossConfig)
    loss = core.get_policy_loss_fn("tokenpo_ppo_clip")(OLD, NEW, ADVANTAGES, MASK, "token-mean", actor)[0]
    stats = TokenStats(mask=MASK, logps=NEW, old_logps=OLD)
    torch.testing.assert_close(loss, methods.get("ppo_clip").function(stats, ADVANTAGES, clip_high=0.28).loss)
    algorithm = omega_conf_to_dataclass(
        configured(
            "algorithm._target_=tokenpo.integrations.verl.config.AlgoConfig", "+algorithm.tokenpo.eps=0.5"
        ).algorithm
    )
    assert isinstance(algorithm, AlgoConfig)
    batch = compute_advantage(data(), "tokenpo_grpo", config=algorithm).batch
    torch.testing.assert_close(batch["advantages"], grpo_advantages(REWARDS, GROUP, MASK, eps=0.5))


@pytest.mark.parametrize(
    ("overrides", "needs"),
    [
        (["algorithm.adv_estimator=tokenpo_ktae", TRAINER], ("tokens",)),
        (["algorithm.adv_estimator=tokenpo_ppo_gae", TRAINER, "critic.enable=True"], ("values",)),
        (
            ["algorithm.adv_estimator=tokenpo", TRAINER, "+algorithm.tokenpo=[{name: tempo},{name: a3po}]"],
            ("tokens", "old_logps"),
        ),
    ],
)
def test_launch_lines_that_work(overrides, needs):
    assert run_composition(configured(*overrides)).needs == needs


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["algorithm.adv_estimator=tokenpo_ktae"], "set trainer.v1.trainer_mode=tokenpo"),
        (["algorithm.adv_estimator=tokenpo_ktea", TRAINER], "did you mean 'tokenpo_ktae'"),
        (["algorithm.adv_estimator=tokenpo_ppo_gae", TRAINER], "set critic.enable=True"),
        (["algorithm.adv_estimator=tokenpo_canon", TRAINER, "algorithm.rollout_correction.bypass_mode=True"], "bypass"),
        (["algorithm.adv_estimator=tokenpo"], "reads a list"),
        (["algorithm.adv_estimator=tokenpo", "+algorithm.tokenpo=[grpo,ha_dw]"], "ha_dw filters or remembers"),
        (["algorithm.adv_estimator=tokenpo", "+algorithm.tokenpo=[grpo,dynamic_sampling]"], "filters or remembers"),
        (["algorithm.adv_estimator=tokenpo_rloo", "+algorithm.tokenpo.eps=1"], "no hyperparameter 'eps'"),
        (["algorithm.adv_estimator=tokenpo_rloo", "algorithm.lam=0.9"], "does not read algorithm.lam=0.9"),
        ([f"{LOSS}.loss_mode=tokenpo_ppo_clip", f"+{LOSS}.tokenpo.clip_high=0.28"], f"_target_={TARGET}"),
        ([*OURS, f"+{LOSS}.tokenpo.kl_coef=0.1"], "actor.use_kl_loss"),
        ([*OURS, "actor_rollout_ref.actor.clip_ratio_high=0.3"], "does not read actor.clip_ratio_high=0.3"),
        ([f"{LOSS}.loss_mode=tokenpo_hapo"], "no objective 'tokenpo_hapo'"),
        (["algorithm.advestimator=grpo"], "advestimator"),
    ],
)
def test_launch_lines_that_cannot_work(overrides, sentence, capsys):
    assert main([ACTOR, *overrides]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


class Queue:
    """Columns by key as verl's TransferQueue keeps them: one ragged row a response."""

    def __init__(self, columns):
        self.columns = {name: torch.nested.nested_tensor(rows, layout=torch.jagged) for name, rows in columns.items()}

    def get(self, keys, partition_id, select_fields):
        there = {name: self.columns[name] for name in select_fields if name in self.columns}
        if "uid" in select_fields:
            there["uid"] = list(UIDS)
        return TensorDict(there, batch_size=len(keys))

    def put(self, keys, partition_id, fields):
        self.columns.update(fields.items())
        return transfer_queue.KVBatchMeta(keys=keys, partition_id=partition_id, tags=[{} for _ in keys])


def trainer(monkeypatch, tmp_path, *overrides):
    config = configured(TRAINER, f"trainer.default_local_dir={tmp_path}", *overrides)
    ragged = {
        "rm_scores": SCORES, "response_mask": MASK.long(), "responses": COLUMNS["tokens"],
        "old_log_probs": COLUMNS["old_logps"], "entropy": COLUMNS["entropy"],
    }  # fmt: skip
    queue = Queue({key: [row[:n] for row, n in zip(x, LENGTHS, strict=True)] for key, x in ragged.items()})
    monkeypatch.setattr(transfer_queue, "kv_batch_get", queue.get)
    monkeypatch.setattr(transfer_queue, "kv_batch_put", queue.put)
    made = TokenpoTrainer(config)
    made.global_steps = 40
    return made, queue, queue.put([f"{uid}_{i}_0" for i, uid in enumerate(UIDS)], "train", {})


def padded(x):
    return x.to_padded_tensor(0.0, output_size=(6, 6))


def test_the_trainer_hands_over_what_verl_computed(monkeypatch, tmp_path):
    lists = "+algorithm.tokenpo=[{name: ktae},{name: a3po, fraction: 0.5}]"
    made, queue, batch = trainer(monkeypatch, tmp_path, "algorithm.adv_estimator=tokenpo", lists)
    assert made.trainer_mode == "sync" and type(made.replay_buffer).__name__ == "ReplayBuffer"
    made._compute_advantage(batch, {})
    expected = compose_advantages([{"name": "ktae"}, {"name": "a3po", "fraction": 0.5}])(
        REWARDS, GROUP, MASK, **INPUTS_
    )
    torch.testing.assert_close(padded(queue.columns["advantages"]), expected.advantages, rtol=0, atol=1e-12)


INPUTS_ = {key: INPUTS[key] for key in ("tokens", "old_logps", "entropy", "step", "token_rewards")}


def test_the_trainer_writes_what_filters_leave(monkeypatch, tmp_path):
    made, queue, batch = trainer(
        monkeypatch, tmp_path, "algorithm.adv_estimator=tokenpo", "+algorithm.tokenpo=[grpo,{name: d3s_rows, keep: 3}]"
    )
    metrics = {}
    made._compute_advantage(batch, metrics)
    kept = MASK & d3s_rows(grpo_advantages(REWARDS, GROUP, MASK), MASK, keep=3).unsqueeze(-1)
    assert torch.equal(padded(queue.columns["response_mask"]).bool(), kept)
    assert metrics["tokenpo/kept_tokens"] == pytest.approx(kept.sum().item() / LENGTHS.sum().item())


def test_the_trainer_leaves_verls_own_estimators_alone(monkeypatch, tmp_path):
    made, queue, batch = trainer(monkeypatch, tmp_path, "algorithm.adv_estimator=rloo")
    made._compute_advantage(batch, {})
    expected = methods.get("rloo").function(REWARDS, GROUP, MASK)
    torch.testing.assert_close(padded(queue.columns["advantages"]), expected, rtol=0, atol=1e-6)


def test_what_remembers_comes_back(monkeypatch, tmp_path):
    lists = ["algorithm.adv_estimator=tokenpo", "+algorithm.tokenpo=[grpo,ha_dw]"]
    saved = trainer(monkeypatch, tmp_path, *lists)[0]
    saved._compute_advantage(trainer(monkeypatch, tmp_path, *lists)[2], {})
    parent = type(saved).__mro__[1]
    monkeypatch.setattr(parent, "_save_checkpoint", lambda self: None)
    monkeypatch.setattr(parent, "_load_checkpoint", lambda self: setattr(self, "global_steps", 40))
    saved._save_checkpoint()
    assert (tmp_path / "global_step_40" / STATE).exists()
    resumed = trainer(monkeypatch, tmp_path, *lists)[0]
    fresh = resumed.composition.state_dict()
    resumed._load_checkpoint()
    assert isinstance(resumed.composition.parts[1].function, HADW)
    assert resumed.composition.state_dict() == saved.composition.state_dict() != fresh
