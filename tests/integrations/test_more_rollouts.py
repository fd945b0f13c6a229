"""What a method samples for itself: values of cuts, trees, groups sampled again, temperatures; stages of updates."""

import json

import pytest
import torch
from rl_run import PROMPTS, Advantages, config, rows, run, vowels
from tiny import make_model

from tokenpo.advantages import HAPOTemperature, hapo_temperature, spo_cutpoints, tree_advantages
from tokenpo.errors import InputError
from tokenpo.integrations.sampling import Heated, Node, check_sampling, make_sampling, tree_rows
from tokenpo.integrations.trl import TokenGRPOTrainer
from tokenpo.losses import entropy_statistics


def some(completions, **kwargs):
    """The share of vowels, never 0."""
    return [1 + share for share in vowels(completions)]


class Kept(TokenGRPOTrainer):
    """Keeps what `add_advantages` saw and gave."""

    def _measure(self, rollouts, out):
        super()._measure(rollouts, out)
        self.rollouts = rollouts

    def add_advantages(self, out, inputs):
        super().add_advantages(out, inputs)
        self.out = out


def one_batch(folder, **options):
    return config(folder, max_steps=1, per_device_train_batch_size=8, gradient_accumulation_steps=1, **options)


def test_values_of_cuts_are_mean_rewards_of_the_continuations(tmp_path):
    """Every reward, response and count is in the file and the metrics; the advantages are those of the values."""
    entry = {"name": "spo_chain", "threshold": 0.1, "interval": 2}
    trainer, keep = run(
        one_batch(tmp_path), cls=Kept, reward=some, advantages=[entry], objective={"name": "spo", "kl_coef": 0.0},
        sampling=[{"name": "spo_chain", "rollouts": 3}], keep_rollouts=8,
    )  # fmt: skip
    known, mask = trainer.rollouts.known, trainer.rollouts.mask
    cuts = spo_cutpoints(known["old_logps"], mask, threshold=0.1, interval=2)
    values = known["prefix_values"]
    assert torch.equal(values != 0, cuts) and cuts.sum() > 8
    lines = [json.loads(line) for line in (tmp_path / "continuations.jsonl").read_text().splitlines()]
    found = {}
    for line in lines:
        found.setdefault((line["row"], line["column"]), []).append(line)
    prefixes = {}
    for row, column in cuts.nonzero().tolist():
        tokens = trainer.rollouts.tokens[row, :column].tolist()
        prefixes.setdefault((int(trainer.rollouts.group[row]), *tokens), []).append((row, column))
    assert sorted(found) == sorted(places[0] for places in prefixes.values())
    decode = trainer.processing_class.decode
    for (_, *tokens), places in prefixes.items():
        own = found[places[0]]
        begin = decode(tokens, skip_special_tokens=True)
        assert len(own) == 3 and all(line["response"].startswith(begin) for line in own)
        assert [line["reward"] for line in own] == pytest.approx(some([line["response"] for line in own]))
        for row, column in places:
            assert values[row, column].item() == pytest.approx(sum(line["reward"] for line in own) / 3)
    log = keep.logs[0]
    assert (log["sampling/prefixes"], log["sampling/responses"]) == (len(found), 3 * len(found)) == (
        len(prefixes), len(lines))  # fmt: skip
    assert len(lines) <= log["sampling/tokens"] <= 8 * len(lines)
    white = trainer.out["advantages"]
    counted = trainer.out["loss_mask"]
    assert white.abs().sum() > 1 and abs(white[counted].mean().item()) < 1e-5
    assert torch.equal(white != 0, counted) and 0 < counted.sum() < mask.sum()
    assert torch.equal(counted, mask & (known["old_logps"].exp() < 0.1))


def test_what_the_length_cuts_off_can_count_as_a_failure(tmp_path):
    """Nobody ends within two tokens here, so that every value is the penalty's."""
    args = one_batch(tmp_path, max_completion_length=2, generation_kwargs={"suppress_tokens": [2]})
    sampling = [{"name": "spo_chain", "rollouts": 2, "unfinished": -3.0}]
    trainer, _ = run(args, cls=Kept, reward=some, advantages=["spo_chain"], sampling=sampling)
    values = trainer.rollouts.known["prefix_values"]
    assert set(values[values != 0].tolist()) == {-3.0}


def test_rows_of_a_tree():
    """Root, two segments, two leaves behind the first, fillers."""
    behind = [Node(1, [5, 6], [8], False), Node(1, [5, 6], [2], True)]
    nodes = [Node(0, [], [5, 6], False), Node(0, [], [7, 2], True), *behind]
    found = tree_rows([9], nodes, 7, 2)
    assert found["prompt_ids"] == [[9], [9], [9], [9, 5, 6], [9, 5, 6], [9], [9]]
    assert found["completion_ids"] == [[2], [5, 6], [7, 2], [8], [2], [2], [2]]
    assert found["env_mask"] == [[0], [1, 1], [1, 1], [1], [1], [0], [0]]
    assert [c["parent"] for c in found["spo_tree"]] == [-1, 0, 0, 1, 1, -1, -1]
    assert [c["leaf"] for c in found["spo_tree"]] == [False, False, True, True, True, False, False]
    assert [c["response"] for c in found["spo_tree"]][1:5] == [[5, 6], [7, 2], [5, 6, 8], [5, 6, 2]]


def test_a_tree_is_sampled_scored_and_compared(tmp_path):
    """Branching 2, 2: of each prompt a root, two segments of three tokens and what follows them."""
    trainer, keep = run(
        one_batch(tmp_path, num_generations=8), cls=Kept, reward=some, advantages=["spo_tree"],
        sampling=[{"name": "spo_tree", "branching": [2, 2], "segment": 3}],
    )  # fmt: skip
    rollouts, out = trainer.rollouts, trainer.out
    columns = [row["spo_tree"] for row in rollouts.rows]
    parent, rewards = rollouts.known["parent"], rollouts.rewards
    segments = [i for i, column in enumerate(columns) if column["parent"] >= 0]
    assert parent.tolist() == [c["parent"] for c in columns] and 4 <= len(segments) <= 6
    prompt = rollouts.batch["prompt_lengths"].tolist()
    ids = rollouts.batch["input_ids"].tolist()
    for i in segments:
        tokens = rollouts.tokens[i][rollouts.mask[i]].tolist()
        before = columns[columns[i]["parent"]]["response"] if columns[i]["parent"] > 0 else []
        assert columns[i]["response"] == before + tokens and ids[i][prompt[0] : prompt[i]] == before
        if columns[i]["parent"] == 0:
            assert len(tokens) == 3 or tokens[-1] == 2
            assert columns[i]["leaf"] == (tokens[-1] == 2)
    texts = trainer.processing_class.batch_decode([c["response"] for c in columns], skip_special_tokens=True)
    for column, text, reward in zip(columns, texts, rewards.tolist(), strict=True):
        assert (reward == pytest.approx(some([text])[0])) if column["leaf"] else reward != reward
    worth = {i: rewards[i].item() for i in range(8) if columns[i]["leaf"]}
    for i in reversed(range(8)):
        below = [worth[j] for j in range(i + 1, 8) if columns[j]["parent"] == i]
        worth.setdefault(i, sum(below) / len(below) if below else None)
    for i in range(8):
        counted = rollouts.mask[i]
        expected = worth[i] - worth[columns[i]["parent"]] if i in segments else 0.0
        assert out["advantages"][i][counted].tolist() == pytest.approx([expected] * int(counted.sum()), abs=1e-5)
        assert bool(counted.any()) == (i in segments)
    assert torch.allclose(tree_advantages(parent, rewards)[segments], out["advantages"][segments, 0], atol=1e-6)
    log = keep.logs[0]
    assert log["sampling/segments"] == len(segments) and log["sampling/responses"] == sum(c["leaf"] for c in columns)
    assert log["sampling/tokens"] == int(rollouts.mask.sum())
    assert any(g.abs().max() > 1e-4 for g in keep.gradients[0].values())


def test_trees_of_two_prompts_and_the_authors_filter(tmp_path):
    trainer, _ = run(
        config(tmp_path, max_steps=1, num_generations=4, per_device_train_batch_size=8, gradient_accumulation_steps=1),
        cls=Kept, reward=some, advantages=["spo_tree", "spo_tree_kept", "whiten"], objective="spo",
        sampling=[{"name": "spo_tree", "branching": [3], "segment": 2}],
    )  # fmt: skip
    assert trainer.rollouts.known["parent"].tolist() == [-1, 0, 0, 0, -1, 4, 4, 4]


def dull_for(*dull):
    return lambda prompts, completions, **_: [
        0.5 if p in dull else s for p, s in zip(prompts, vowels(completions), strict=True)
    ]


def test_groups_with_equal_rewards_get_other_prompts(tmp_path):
    """Half of the prompts are dull: after some attempts none of them is in the batch."""
    dull = PROMPTS[:4]
    trainer, keep = run(
        config(tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=1, max_steps=4, learning_rate=0.0),
        cls=Kept, reward=dull_for(*dull), sampling=[{"name": "dynamic_sampling", "attempts": 30}], keep_rollouts=8,
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert len(lines) == 32 and not {line["prompt"] for line in lines} & {*dull}
    assert all(line["reward"] == pytest.approx(vowels([line["completion"]])[0]) for line in lines)
    assert all(log["sampling/dull_groups"] == 0 for log in keep.logs)
    assert sum(log["sampling/attempts"] for log in keep.logs) > 0
    for log in keep.logs:
        most, least = 8 + 8 * log["sampling/attempts"], 8 + 4 * log["sampling/attempts"]
        assert least <= log["sampling/responses"] <= most
    assert trainer.rollout_func is None


def test_attempts_end_and_the_budget_is_logged(tmp_path):
    sampling = [{"name": "dynamic_sampling", "attempts": 3}]
    _, keep = run(one_batch(tmp_path), reward=dull_for(*PROMPTS), sampling=sampling)
    log = keep.logs[0]
    assert (log["sampling/attempts"], log["sampling/responses"], log["sampling/dull_groups"]) == (3, 32, 2)


def test_lively_groups_are_left_alone(tmp_path):
    plain, _ = run(one_batch(tmp_path), cls=Advantages)
    again, keep = run(one_batch(tmp_path), cls=Advantages, sampling=["dynamic_sampling"])
    assert again.kept == plain.kept and keep.logs[0]["sampling/responses"] == 8


def test_logits_are_divided_by_the_temperature_of_their_entropy():
    temperature = HAPOTemperature(tau=0.5)
    scores = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    scores[0, 3] = -torch.inf
    assert torch.equal(Heated(temperature, 1.0)(None, scores), scores)
    temperature.update(torch.rand(2, 5), torch.ones(2, 5, dtype=torch.bool))
    entropy = torch.distributions.Categorical(logits=scores / 0.7).entropy()
    expected = scores / hapo_temperature(entropy, temperature.statistics, tau=0.5).unsqueeze(-1)
    torch.testing.assert_close(Heated(temperature, 0.7)(None, scores), expected)


HEATED = {"sampling": [{"name": "hapo_temperature", "tau": 0.9}]}


def test_temperatures_follow_the_rollouts_of_the_step_before(tmp_path):
    trainer, _ = run(config(tmp_path / "a", max_steps=1), cls=Kept, **HEATED)
    known = trainer.rollouts.known
    expected = entropy_statistics(known["entropy"], trainer.rollouts.mask)
    assert trainer.sampling.temperature.state_dict()["statistics"] == pytest.approx([float(x) for x in expected])
    plain, _ = run(config(tmp_path / "b", max_steps=2), cls=Advantages)
    heated, _ = run(config(tmp_path / "c", max_steps=2), cls=Advantages, **HEATED)
    assert heated.kept[:8] == plain.kept[:8] and heated.kept[8:] != plain.kept[8:]
    assert "generate" not in vars(heated.model)


def test_temperatures_resume(tmp_path):
    whole, kept = run(config(tmp_path / "run", max_steps=4, save_strategy="steps", save_steps=2), **HEATED)
    resumed, rest = run(
        config(tmp_path / "again", max_steps=4), resume=str(tmp_path / "run" / "checkpoint-2"), model=make_model(5),
        **HEATED,
    )  # fmt: skip
    assert rest.losses == pytest.approx(kept.losses[2:], abs=1e-7) and len(set(rest.losses)) == 2
    assert resumed.sampling.temperature.state_dict() == whole.sampling.temperature.state_dict()
    run(config(tmp_path / "b", max_steps=1, save_strategy="steps", save_steps=1))
    with pytest.raises(InputError, match=r"has no sampling\.json: it was written by a run without hapo_temperature"):
        run(config(tmp_path / "c"), resume=str(tmp_path / "b" / "checkpoint-1"), **HEATED)


TWO = {"num_iterations": 2, "steps_per_generation": 2}
STAGES = {"stages": {"name": "lopti", "eta": 0.03}}


def test_the_gradients_of_the_stages_add_up(tmp_path):
    """With a learning rate of zero, improbable tokens and then the others give together what all give at once."""
    still = {"learning_rate": 0.0, "max_steps": 2}
    objective = {"name": "ppo_clip", "kl_coef": 0.1, "entropy_coef": 0.01}
    _, plain = run(config(tmp_path, **still, **TWO), objective=objective)
    _, kept = run(config(tmp_path, **still, **TWO), objective=objective, **STAGES)
    for name, gradient in plain.gradients[0].items():
        first, second = (step[name] for step in kept.gradients)
        assert torch.allclose(first + second, gradient, atol=1e-6)
    sizes = [max(float(g.abs().max()) for g in step.values()) for step in kept.gradients]
    assert min(sizes) > 1e-3 and sizes[0] != sizes[1]


def test_stages_move_the_model_twice(tmp_path):
    """The second stage sees the model that the first one left: its ratios are not 1."""
    _, kept = run(config(tmp_path, max_steps=4, learning_rate=0.1, **TWO), **STAGES)
    assert [log["ratio"] == pytest.approx(1.0, abs=1e-6) for log in kept.logs] == [True, False, True, False]


def test_what_cannot_work_is_said_before_anything_loads(tmp_path):
    def said(sentence, args=None, **options):
        with pytest.raises(InputError, match=sentence):
            run(args or config(tmp_path), **options)

    said("'spo_chain' needs 'prefix_values', which is not available", advantages=["spo_chain"])
    said("there is no way of sampling 'spo_chian': did you mean 'spo_chain'", sampling=["spo_chian"])
    said(r"rollouts must lie in", sampling=[{"name": "spo_chain", "rollouts": 0}])
    said(r"branching must be numbers of at least 1", sampling=[{"name": "spo_tree", "branching": [2, 0]}])
    said(r"branching \[6, 6\] has up to 43 rows with its root, but num_generations is 4",
         sampling=[{"name": "spo_tree", "branching": [6, 6]}])  # fmt: skip
    said("take spo_chain and dynamic_sampling out", sampling=["spo_tree", "dynamic_sampling"])
    said("take rollout_func away", sampling=["dynamic_sampling"], rollout_func=lambda prompts, trainer: {})
    said("set num_iterations=2", **STAGES)
    said("spo_chain, whose 'prefix_values' the estimator 'grpo' does not read", sampling=["spo_chain"])
    tree = [{"name": "spo_tree", "branching": [2], "segment": 3}]
    said("spo_tree, whose 'parent' the estimator 'grpo' does not read", sampling=tree)
    said("spo_tree, whose 'parent' the estimator 'grpo'", sampling=tree, advantages=["grpo", "spo_tree_kept"])
    said("unset mask_truncated_completions", config(tmp_path, num_generations=8, mask_truncated_completions=True),
         sampling=[{"name": "spo_tree", "branching": [2], "segment": 3}])  # fmt: skip
    cut = config(tmp_path)
    cut.per_device_train_batch_size, cut.steps_per_generation = 3, 1
    with pytest.raises(InputError, match="the 3 rows of a process must be a multiple of num_generations = 4"):
        check_sampling(make_sampling(tree), cut, None)
    assert make_sampling([]).gives == set() and len(rows(2)) == 2
