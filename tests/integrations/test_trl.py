"""TokenGRPOTrainer: equal to TRL's trainer where both say the same, exact over windows, and clear about mistakes."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rl_run import (
    close_gradients,
    config,
    fixed_rollouts,
    fixed_runs,
    in_two_processes,
    rows,
    run,
    run_theirs,
    some_vowels,
    vowels,
)
from tiny import make_model, make_tokenizer
from transformers import AutoModelForCausalLM
from trl import GRPOTrainer

from tokenpo.errors import InputError
from tokenpo.evaluation.scorers import reward_function
from tokenpo.integrations.rollouts import logps_under
from tokenpo.integrations.trl import TokenGRPOTrainer, check_hooks
from tokenpo.methods import all_methods
from tokenpo.reward_models import Reading, RewardModel

THEIRS = [{"name": "grpo", "eps": 1e-4}]
PLAIN = {"name": "ppo_clip", "dual_clip": None}
ROWS = {**PLAIN, "aggregation": "row_mean_of_means"}


def close(theirs, ours, tolerance=1e-5):
    assert ours.losses == pytest.approx(theirs.losses, abs=tolerance)
    assert len(ours.gradients) == len(theirs.gradients) > 0
    for a, b in zip(theirs.gradients, ours.gradients, strict=True):
        assert max(float((a[n] - b[n]).abs().max()) for n in a) < tolerance
    assert max(float(g.abs().max()) for step in theirs.gradients for g in step.values()) > 1e-2


@pytest.mark.parametrize(
    ("theirs", "objective"),
    [
        ({"loss_type": "dapo", "temperature": 0.8}, PLAIN),
        ({"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": False}, {**ROWS, "kl_coef": 0.3}),
        ({"loss_type": "dapo", "beta": 0.3, "activation_checkpointing": True}, {**PLAIN, "kl_coef": 0.3, "kl": "k3+"}),
        ({"loss_type": "grpo", "num_iterations": 2, "learning_rate": 0.1, "epsilon": 0.1},
         {**ROWS, "clip_low": 0.1, "clip_high": 0.1}),
        ({"loss_type": "grpo", "steps_per_generation": 4, "learning_rate": 0.1, "delta": 1.5},
         {**ROWS, "dual_clip": 1.5}),
        ({"loss_type": "cispo", "num_iterations": 2, "learning_rate": 0.1, "epsilon_high": 1.05},
         {"name": "cispo", "clip_high": 0.05}),
        ({"loss_type": "grpo", "importance_sampling_level": "sequence", "num_iterations": 2, "learning_rate": 0.01,
          "epsilon": 3e-3, "epsilon_high": 4e-3},
         {"name": "gspo_sequence", "clip_low": 3e-3, "clip_high": 4e-3}),
    ],
)  # fmt: skip
def test_the_same_losses_and_gradients_as_trl(theirs, objective, tmp_path, model_folder):
    """Accumulation 2, four updates; the model is that of the folder, from which TRL takes its reference."""
    shared = ("temperature", "num_iterations", "learning_rate", "steps_per_generation", "activation_checkpointing")
    ours = {k: v for k, v in theirs.items() if k in shared}
    load = lambda: AutoModelForCausalLM.from_pretrained(model_folder)
    steps = {"max_steps": 4}
    _, a = run_theirs(config(tmp_path / "a", **theirs, **steps), model=load())
    trainer, b = run(config(tmp_path / "b", **ours, **steps), model=load(), advantages=THEIRS, objective=objective)
    close(a, b)
    assert next(iter(trainer.sharing.verdicts.values()))
    if "num_iterations" in theirs:
        assert any(log["ratio"] != 1 for log in b.logs)
    if "beta" in theirs:
        assert b.logs[-1]["kl/reference"] > 1e-4


def test_one_loss_however_rows_are_split(tmp_path):
    """1 x 8 and 4 x 2, with shared prompts and without: unequal lengths would show a mean of means."""
    found = [
        run(config(tmp_path, per_device_train_batch_size=b, gradient_accumulation_steps=a), share_prompts=share)[1]
        for b, a, share in ((8, 1, True), (2, 4, False), (4, 2, True))
    ]
    for other in found[1:]:
        close(found[0], other)


def test_a_window_shorter_than_the_accumulation(tmp_path):
    """Three batches, accumulation 2: the first update weighs two by their tokens, the second is the third alone."""
    options = {"steps_per_generation": 1, "learning_rate": 0.0, "max_steps": -1, "num_train_epochs": 1}
    _, one = run(config(tmp_path, gradient_accumulation_steps=1, **options), data=rows(3))
    _, two = run(config(tmp_path, gradient_accumulation_steps=2, **options), data=rows(3))
    assert len(one.gradients) == 3 and len(two.gradients) == 2
    for name, last in two.gradients[1].items():
        assert torch.allclose(last, one.gradients[2][name], atol=1e-6)
    counts = [round(log["completions/mean_length"] * 4) for log in one.logs[:2]]
    for name, first in two.gradients[0].items():
        expected = sum(n * g[name] for n, g in zip(counts, one.gradients[:2], strict=True)) / sum(counts)
        assert torch.allclose(first, expected, atol=1e-6)


LISTS = {
    "tokens": {"advantages": ["ktae", {"name": "a3po", "fraction": 0.3}, "whiten"],
               "objective": {"name": "ppo_clip", "kl_coef": 0.1, "kl": "exact"}},
    "filters": {"advantages": [{"name": "overlong", "max_length": 7, "buffer": 3}, "tempo", "dynamic_sampling",
                               {"name": "d3s_tokens", "fraction": 0.5}],
                "objective": {"name": "gspo", "aggregation": "row_mean_of_means"}},
    "critic": {"advantages": ["ppo_gae", "ha_dw"], "critic": {"learning_rate": 1e-2}},
    "vocabulary": {"advantages": ["grpo", "tw_grpo", "thr"], "objective": "hapo"},
}  # fmt: skip


def test_two_processes_that_cut_a_group(tmp_path):
    """Three groups of four over two processes of six rows: the advantages and gradients of one process with twelve."""
    (tmp_path / "two").mkdir()
    both = in_two_processes("rl_run.py", tmp_path / "two", json.dumps(LISTS))
    for name, one in fixed_runs(tmp_path / "one", LISTS, 6).items():
        first, second = (found[name] for found in both)
        assert first["losses"] == pytest.approx(one["losses"], abs=1e-6), name
        close_gradients(one["gradients"], first["gradients"], name)
        in_order = sorted([*first["advantages"], *second["advantages"]], key=lambda row: row[0])
        assert len(in_order) == 36 and len({str(a) for *_, a in in_order}) > 4
        for (*of_one, expected), (*of_two, advantages) in zip(one["advantages"], in_order, strict=True):
            assert of_one == of_two and advantages == pytest.approx(expected, abs=1e-5), name


SCHEDULE = {"name": "d3s", "steps": 6, "rows": [4, 8], "fraction": [0.5, 1.0]}


@pytest.mark.parametrize("every", [3, 4])
def test_a_resumed_run_goes_on_as_if_nothing_had_been(every, tmp_path):
    """Eight updates, the rollouts of a batch serving four: stopped in the middle of one, and at the end of one."""
    options = {"advantages": ["ppo_gae", "ha_dw", SCHEDULE], "critic": {"learning_rate": 1e-2}}
    given = config(tmp_path / "run", max_steps=8, save_strategy="steps", save_steps=every, save_total_limit=9,
                   steps_per_generation=4, num_iterations=2, optim="adamw_torch")  # fmt: skip
    whole, kept = run(given, **options)
    at = tmp_path / "run" / f"checkpoint-{every}"
    again = config(tmp_path / "again", max_steps=8, steps_per_generation=4, num_iterations=2, optim="adamw_torch")
    resumed, rest = run(again, resume=str(at), model=make_model(5), **options)
    assert rest.losses == pytest.approx(kept.losses[every:], abs=1e-7) and len(set(rest.losses)) == 8 - every
    assert resumed.composition.state_dict() == whole.composition.state_dict()
    for (name, a), b in zip(
        whole.critic.network.state_dict().items(), resumed.critic.network.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_a_checkpoint_of_another_list_is_refused(tmp_path):
    given = config(tmp_path / "run", max_steps=1, save_strategy="steps", save_steps=1)
    run(given, advantages=["grpo", "ha_dw"])
    with pytest.raises(InputError, match="resume with the same list"):
        run(config(tmp_path / "b"), resume=str(tmp_path / "run" / "checkpoint-1"), advantages=["grpo"])
    with pytest.raises(InputError, match=r"has no critic\.safetensors: it was written by a run without a critic"):
        run(config(tmp_path / "b"), resume=str(tmp_path / "run" / "checkpoint-1"), advantages=["ppo_gae", "ha_dw"],
            critic={})  # fmt: skip


# Every method runs one update.

INPUTS = {
    "answer_ids": lambda r: [text[:1] for text in r.completions],
    "prefix_values": lambda r: torch.rand(len(r.mask), r.mask.shape[1] + 1, generator=torch.Generator().manual_seed(0)),
    "parent": lambda r: torch.tensor([-1, -1, 0, 0, 1, 1, 2, 3])[: len(r.mask)],
    "clip_low": lambda r: r.mask * 0.1,
    "clip_high": lambda r: r.mask * 0.3,
}
NEEDED = {"d3s_rows": {"keep": 5}, "d3s_group_rows": {"keep": 2}, "d3s_tokens": {"fraction": 0.5}, "d3s": SCHEDULE,
          "overlong": {"max_length": 8, "buffer": 4}}  # fmt: skip
KINDS = ("estimator", "shaper", "filter", "reward_shaper")
METHODS = sorted([*(n for n, m in all_methods().items() if m.kind in KINDS), "d3s"])
OBJECTIVES = sorted(all_methods("policy_gradient"))


def listed(name):
    entry = {**NEEDED.get(name, {}), "name": name}
    kind = "filter" if name == "d3s" else all_methods()[name].kind
    return {"estimator": [entry], "reward_shaper": [entry, "grpo"]}.get(kind, ["grpo", entry])


@pytest.mark.parametrize("name", METHODS)
def test_every_estimator_shaper_and_filter_runs(name, tmp_path):
    critic = {} if name in ("ppo_gae", "vapo") else None
    needs = () if name == "d3s" else all_methods()[name].needs
    credit = (lambda r: r.mask * r.rewards.unsqueeze(-1)) if "token_rewards" in needs else None
    inputs = {**INPUTS, "ref_rewards": lambda r: r.rewards * 0.5} if name == "aapo_unscaled" else INPUTS
    _trainer, keep = run(
        config(tmp_path, max_steps=1, gradient_accumulation_steps=1, per_device_train_batch_size=8),
        advantages=listed(name), inputs=inputs, critic=critic, credit=credit, keep_rollouts=8, reward=some_vowels,
    )  # fmt: skip
    written = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert len(written) == 8 and all(len(r["tokens"]) == len(r["advantages"]) for r in written)
    values = [a for row in written for a in row["advantages"]]
    assert any(values) and all(abs(v) < 50 for v in values)
    assert all(torch.isfinite(g).all() for g in keep.gradients[0].values())
    assert any(g.abs().max() > 1e-4 for g in keep.gradients[0].values())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_runs(name, tmp_path):
    arguments = {"dr_grpo_clip": {"length": 8}}.get(name, {})
    _, keep = run(
        config(tmp_path, max_steps=1), objective={"name": name, **arguments}, inputs=INPUTS, correct_above=0.1
    )
    assert all(torch.isfinite(g).all() for g in keep.gradients[0].values())
    assert any(g.abs().max() > 1e-4 for g in keep.gradients[0].values())


def test_rto_pays_the_dpo_models_log_ratios_to_a_critic(tmp_path):
    options = {"credit": {"name": "rto", "dpo_coef": 1.0}, "inputs": {"dpo_logps": logps_under(make_model(9))}}
    trainer, keep = run(config(tmp_path), advantages=["ppo_gae"], critic={"learning_rate": 1e-2}, **options)
    assert trainer.reads == ("old_logps", "ref_logps") and keep.logs[-1]["critic/error"] > 0
    assert all(g.isfinite().all() for g in keep.gradients[-1].values())


# Filters, critic, reference.


def test_rows_that_a_filter_takes_out_leave_the_counts(tmp_path):
    """One of two groups has equal rewards: the loss divides by the tokens of the other alone."""
    reward = lambda prompts, completions, **_: [
        0.0 if p == rows_order[0] else r for p, r in zip(prompts, vowels(completions), strict=True)
    ]
    rows_order = ["say a:"]
    data = rows(2)
    plain, a = run(config(tmp_path, max_steps=1), advantages=["grpo"], reward=reward, data=data)
    kept, b = run(config(tmp_path, max_steps=1), advantages=["grpo", "dynamic_sampling"], reward=reward, data=data)
    whole, half = int(plain._counts["tokens"]), int(kept._counts["tokens"])
    assert 0 < half < whole and int(kept._counts["nonempty_rows"]) == 4
    for name, gradient in b.gradients[0].items():
        assert torch.allclose(gradient * half / whole, a.gradients[0][name], atol=1e-6)


def test_a_critic_learns_and_the_policy_waits_for_it(tmp_path):
    """Constant reward 1: the error falls from 1. For two pre-training updates the policy stands still."""
    before = make_model(0).state_dict()
    options = {"advantages": ["vapo"], "reward": lambda completions, **_: [1.0] * len(completions)}
    trainer, keep = run(
        config(tmp_path, max_steps=12, learning_rate=0.1), critic={"learning_rate": 0.01, "pretrain": 2, "clip": None},
        **options,
    )  # fmt: skip
    errors = [log["critic/error"] for log in keep.logs]
    assert errors[0] == pytest.approx(1.0) and errors[-1] < 0.2
    assert all(not g.any() for step in keep.gradients[:2] for g in step.values())
    assert any(g.any() for g in keep.gradients[2].values())
    assert any(not torch.equal(before[n], p) for n, p in trainer.model.state_dict().items())


def test_aapo_asks_the_reference_once_a_prompt(tmp_path):
    trainer, _ = run(config(tmp_path, max_steps=5), advantages=["aapo"], objective="reinforce", data=rows(2))
    (remembered,) = trainer.composition.state_dict().values()
    assert {k: len(v) for k, v in remembered["reference"].items()} == {'"say a:"': 4, '"say bcd:"': 4}


def test_a_reference_response_without_a_reward_leaves_the_margin_out(tmp_path):
    reward = lambda completions, **_: [None, *vowels(completions)[1:]]
    trainer, _ = run(config(tmp_path, max_steps=1), advantages=["aapo"], objective="reinforce", reward=reward)
    (remembered,) = trainer.composition.state_dict().values()
    missing = [r != r for rewards in remembered["reference"].values() for r in rewards]
    assert sum(missing) == 1 and len(missing) == 8


def test_the_critic_learns_the_rewards_that_the_estimator_sees(tmp_path):
    """Reward 1 and a punishment of 3 for every response longer than a token: V starts at 0, its error at 4."""
    shaper = {"name": "overlong", "max_length": 1, "buffer": 0.5, "factor": 3.0}
    ones = lambda completions, **_: [1.0] * len(completions)
    args = config(tmp_path, max_steps=1, generation_kwargs={"suppress_tokens": [2]})
    critic = {"clip": None, "lam": 1.0}
    _, keep = run(args, advantages=[shaper, "ppo_gae"], critic=critic, reward=ones)
    assert keep.logs[0]["critic/error"] == pytest.approx(4.0)


KL = {"name": "ppo_clip", "kl_coef": 0.1}


def test_the_reference_is_compared_with_the_policy_before_the_first_update(tmp_path):
    trainer, _ = run(config(tmp_path / "a", max_steps=2, save_strategy="steps", save_steps=1), objective=KL)
    assert trainer.start["start/reference_difference"] < 1e-5
    plain, _ = run(config(tmp_path / "b", max_steps=1))
    assert plain.start is None
    at = str(tmp_path / "a" / "checkpoint-1")
    resumed, _ = run(config(tmp_path / "c", max_steps=2), resume=at, objective=KL)
    assert resumed.start is None and resumed.state.global_step == 2


@pytest.mark.parametrize("seed", [0, 5])
def test_a_reference_that_is_not_the_start_is_loud(seed, tmp_path, caplog):
    """A copy that has changed is refused; a reference that is another model by its name is allowed, and warned of."""

    class Changed(TokenGRPOTrainer):
        def __init__(self, *given, **named):
            super().__init__(*given, **named)
            with torch.no_grad():
                next(self.model.parameters()).add_(0.3)

    with pytest.raises(InputError, match="at step 0 the policy and its reference 'copy' differ by"):
        run(config(tmp_path, max_steps=1), cls=Changed, objective=KL)
    other = {"reference": "model:other", "load_reference": lambda folder: make_model(seed)}
    trainer, _ = run(config(tmp_path, max_steps=1), objective=KL, **other)
    assert (trainer.start["start/reference_difference"] > 0.1) == ("is another model" in caplog.text) == (seed == 5)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_trained_adapter_is_its_own_reference(dropout, tmp_path):
    """Adapters that start elsewhere than at the base agree with their copy, unless dropout makes them random."""
    lora = LoraConfig(r=2, lora_dropout=dropout, target_modules=["q_proj"], task_type="CAUSAL_LM")
    policy = lambda: get_peft_model(make_model(0), lora)

    def started(model):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        return model

    fresh, _ = run(config(tmp_path, max_steps=1), model=policy(), objective=KL)
    assert fresh.reference.mode == "adapter-off" and fresh.start["start/reference_difference"] < 1e-5
    if dropout:
        with pytest.raises(InputError, match="the policy has dropout: set disable_dropout=True"):
            run(config(tmp_path, max_steps=1), model=started(policy()), objective=KL)
    args = config(tmp_path, max_steps=1, disable_dropout=dropout > 0)
    trained, _ = run(args, model=started(policy()), objective=KL)
    assert trained.reference.mode == "adapter:reference" and trained.start["start/reference_difference"] < 1e-5


def test_only_what_is_read_before_the_update_is_computed(tmp_path):
    reads = lambda **options: run(config(tmp_path, max_steps=1), **options)[0].reads
    assert reads(objective="vapo_clip", correct_above=0.1) == ()
    assert reads(objective="hapo") == ("entropy",)
    assert reads(objective="spo") == ("old_logps",)


def test_evaluation_does_not_move_what_remembers(tmp_path):
    trainer, _ = run(
        config(tmp_path, max_steps=2, eval_strategy="no"), advantages=["grpo", "ha_dw"], eval_dataset=rows(2)
    )
    before = trainer.composition.state_dict()
    found = trainer.evaluate()
    assert trainer.composition.state_dict() == before and "eval_reward" in found


# Mistakes.


@pytest.mark.parametrize(
    ("reward", "sentence"),
    [
        (
            lambda completions, **_: 1 / 0,
            r"the reward function '<lambda>' failed: ZeroDivisionError: division by zero; ",
        ),
        (lambda completions, **_: [1.0] * 3, "returned 3 rewards for 8 completions: give one each"),
        (lambda completions, **_: None, "returned NoneType, not a list with a reward a completion"),
        (lambda completions, **_: [float("inf")] * 8, "returned inf for completion 0: give a finite number, or None"),
        (lambda completions, **_: ["good"] * 8, "returned 'good' for completion 0: a reward is a number"),
    ],
)
def test_a_failing_reward_function_loses_no_rollouts(reward, sentence, tmp_path):
    with pytest.raises(InputError, match=sentence) as error:
        run(config(tmp_path), reward=reward)
    assert "the 8 rollouts of step 0 are in" in str(error.value)
    kept = [json.loads(line) for line in (tmp_path / "rollouts-failed.jsonl").read_text().splitlines()]
    assert len(kept) == 8 and all(row["prompt"] and row["completion"] for row in kept)


def test_a_reward_function_that_fails_late_loses_nothing_of_the_step(tmp_path):
    """It judges the batch, then fails on the continuations of SPO's chain, of which it has read some."""
    asked = []

    def fails(completions, **_):
        asked.append(completions)
        if len(asked) > 1:
            raise ConnectionError("gone")
        return vowels(completions)

    sampling = [{"name": "spo_chain", "rollouts": 2}]
    with pytest.raises(InputError, match="'fails' failed: ConnectionError: gone; the"):
        run(config(tmp_path), reward=fails, advantages=["spo_chain"], objective="spo", sampling=sampling)
    kept = [json.loads(line) for line in (tmp_path / "rollouts-failed.jsonl").read_text().splitlines()]
    assert [row["completion"] for row in kept] == [*asked[0], *asked[1]] and len(asked[1]) > 8
    assert [row["rewards"] for row in kept[:8]] == [[pytest.approx(x)] for x in vowels(asked[0])]


def test_weights_of_the_sampling_engine_are_of_advantages_alone(tmp_path):
    """A weight of 0 takes the surrogate away and leaves KL and entropy; of 1 it changes nothing."""

    class Engine(TokenGRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            out = super()._generate_and_score_completions(inputs)
            return {**out, "importance_sampling_ratio": torch.full_like(out["advantages"][:, :1], self.ratio)}

    def losses(ratio, objective):
        Engine.ratio = ratio
        return run(config(tmp_path, max_steps=2, learning_rate=0.1), cls=Engine, objective=objective)[1]

    full = {**PLAIN, "kl_coef": 0.5, "entropy_coef": 0.1}
    nothing, terms = losses(0.0, PLAIN), losses(0.0, full)
    assert not any(g.abs().max() for step in nothing.gradients for g in step.values())
    assert max(float(g.abs().max()) for g in terms.gradients[0].values()) > 1e-3
    plain, one = run(config(tmp_path, max_steps=2, learning_rate=0.1), objective=full)[1], losses(1.0, full)
    close(plain, one)


@pytest.mark.parametrize("nothing", [None, float("nan")])
def test_a_row_without_a_reward_gets_no_advantage(nothing, tmp_path):
    reward = lambda completions, **_: [nothing, *vowels(completions)[1:]]
    run(config(tmp_path, max_steps=1), reward=reward, keep_rollouts=8)
    written = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert written[0]["reward"] is None and not any(written[0]["advantages"]) and any(written[1]["advantages"])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"advantages": ["ppo_gae"]}, "'ppo_gae' needs 'values', which is not available: configure a critic"),
        ({"advantages": ["copo"]}, "'copo' needs 'answer_ids', which is not available"),
        (
            {"advantages": ["token_rewards_total"]},
            "'token_rewards_total' needs 'token_rewards', which is not available",
        ),
        ({"objective": "vapo_clip"}, "'vapo_clip' needs 'correct', which is not available: say which rewards count"),
        ({"objective": {"name": "ppo_clip", "kl_coef": 0.1}, "reference": "none"}, "'ppo_clip' needs 'ref_logps'"),
        ({"credit": {"name": "rto"}}, "the credit needs 'dpo_logps', which is not available"),
        ({"critic": {"rate": 1.0}}, "critic has no hyperparameter 'rate'"),
        ({"critic": {"learning_rate": 0}}, "critic: learning_rate must lie in (0, inf)"),
        ({"critic": {"epochs": 0}}, "critic: epochs must"),
        ({"critic": {}}, "critic is given, but 'grpo' and 'ppo_clip' read no values: take an estimator"),
        ({"credit": "worths"}, "credit is given, but 'grpo' and 'ppo_clip' read no token_rewards"),
        ({"advantages": ["aapo"], "rollout_func": fixed_rollouts}, "with rollout_func the policy would answer"),
        (
            {"advantages": ["vapo"], "critic": {"pretrain": 2}, "config": {"weight_decay": 0.1}},
            "weight_decay=0.1 moves the policy while the critic is trained alone: set weight_decay=0",
        ),
        ({"config": {"beta": 0.1}}, "beta=0.1 is of TRL's own loss: give the objective kl_coef instead"),
        (
            {"config": {"max_completion_length": 252}},
            "tokens, which leave less than max_completion_length = 252 of the model's 256",
        ),
        (
            {"inputs": {"answer_ids": lambda r: ["a"]}, "advantages": ["copo"]},
            "answer_ids must have a row a rollout, 8 of them",
        ),
    ],
)
def test_what_cannot_work_is_one_sentence(options, sentence, tmp_path):
    given = config(tmp_path, **options.pop("config", {}))
    with pytest.raises((InputError, KeyError)) as error:
        run(given, **options)
    assert sentence in str(error.value)


def test_aapo_refuses_an_engine_that_holds_the_policy(tmp_path):
    args = config(tmp_path)
    args.use_vllm = True
    with pytest.raises(InputError, match="with use_vllm the policy would answer: unset use_vllm"):
        run(args, advantages=["aapo"])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"advantages": ["ppo_gae"]}, "'ppo_gae' needs 'values', which is not available"),
        ({"critic": {}}, "critic is given, but 'grpo' and 'ppo_clip' read no values"),
        ({"reference": "copied"}, "unknown reference 'copied'"),
    ],
)
def test_mistakes_are_said_before_the_model_loads(options, sentence, tmp_path):
    with pytest.raises(InputError, match=sentence):
        TokenGRPOTrainer("no/such-model", vowels, config(tmp_path), **options)


def test_an_empty_completion_is_named(tmp_path):
    def rollouts(prompts, trainer):
        found = fixed_rollouts(prompts, trainer)
        found["completion_ids"][3] = []
        return found

    with pytest.raises(InputError, match="rollout_func returned an empty completion for row 3"):
        run(config(tmp_path), rollout_func=rollouts)


def test_an_engine_that_changed_is_named():
    check_hooks(GRPOTrainer)
    changed = type("Changed", (GRPOTrainer,), {"_compute_loss": lambda self, model: None})
    with pytest.raises(
        InputError, match=r"works with trl>=1\.16,<1\.17; the GRPOTrainer of trl 2\.0 has _compute_loss"
    ):
        check_hooks(changed, "2.0")
    with pytest.raises(InputError, match="has no such method: _generate_and_score_completions"):
        check_hooks(object, "0.9")


def test_a_reward_model_is_the_reward(tmp_path):
    make_model(1).save_pretrained(tmp_path / "start")
    judge = RewardModel.from_backbone(str(tmp_path / "start"), Reading("values"), make_tokenizer())
    judge.save_pretrained(tmp_path / "judge")
    trainer, keep = run(
        config(tmp_path / "run", max_steps=1, gradient_accumulation_steps=1, per_device_train_batch_size=8),
        advantages=["grpo"], reward=reward_function(str(tmp_path / "judge")), keep_rollouts=8,
    )  # fmt: skip
    (file,) = (tmp_path / "run").glob("rollouts*.jsonl")
    kept = [json.loads(line) for line in file.read_text().splitlines()]
    scored = reward_function(str(tmp_path / "judge"))([r["prompt"] for r in kept], [r["completion"] for r in kept])
    assert [r["reward"] for r in kept] == pytest.approx(scored, abs=1e-5) and len(set(scored)) > 1
    assert keep.losses and trainer.state.global_step == 1
