"""Every registered credit function has a name in a configuration, under any loss that reads rewards or weights."""

import itertools
import json
import os
import types

import pytest
import torch
from tiny import make_model, make_pairs, make_tokenizer, write_jsonl

from tokenpo import credit, methods
from tokenpo.cli import main
from tokenpo.commands.config import TrainConfig
from tokenpo.commands.credit import attach_credit, check_credit
from tokenpo.commands.live import LIVE
from tokenpo.commands.rows import load_rows
from tokenpo.commands.sources import CONVERSIONS, NOT_SOURCES, SOURCES
from tokenpo.statistics import response_stats
from tokenpo.training import ENGINES

FIELDS = ("token_rewards", "token_weights")
LOSSES = [
    m.name for m in methods.all_methods().values()
    if m.kind == "pairwise" and set(FIELDS) & set(m.needs) and not {"kl_weights", "ref_risk"} & set(m.needs)
]  # fmt: skip
CALLS = {
    "gold_calls": [{"name": "add", "parameters": '{"a": 1, "b": 2}'}, {"name": "stop", "parameters": "{}"}],
    "chosen_predicted_calls": [
        {"name": "add", "parameters": '{"a": 1, "b": 2}', "turn": 0}, {"name": "stop", "parameters": "{}", "turn": 1}
    ],
    "rejected_predicted_calls": [{"name": "add", "parameters": '{"a": 1}', "turn": 0}],
    "chosen_turns": [{"start": 0, "end": 2}, {"start": 3, "end": 5}],
}  # fmt: skip
PAIR = {"prompt": "say b:", "chosen": "aa. e", "rejected": "b cd"}
SPANS = {
    "chosen_error_spans": [],
    "rejected_error_spans": [
        {"start": 0, "end": 3, "severity": "major"}, {"start": 2, "end": 4, "severity": "minor", "confidence": 0.5}
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def world(model_folder, tmp_path_factory):
    """Tokenised rows, and a folder for each model that a source may read."""
    from tokenpo.reward_models import Reading, RewardModel

    base = tmp_path_factory.mktemp("world")
    folders = {"start": str(model_folder)}
    for seed, name in enumerate(("guide", "sampler", "positive", "negative")):
        make_model(seed + 5).save_pretrained(base / name)
        make_tokenizer().save_pretrained(base / name)
        folders[name] = str(base / name)
    readings = {"score": Reading(), "cost": Reading(), "classes": Reading("token_classes"), "values": Reading("values")}
    for seed, (name, reading) in enumerate(readings.items()):
        model = RewardModel.from_backbone(str(model_folder), reading, make_tokenizer(), seed=seed)
        torch.nn.init.normal_(model.network.score.weight, std=0.5)
        model.save_pretrained(base / name)
        folders[name] = str(base / name)
    data = write_jsonl(base / "pairs.jsonl", [{**PAIR, **CALLS, **SPANS}] * 3)
    config = TrainConfig(model=str(model_folder), train=str(data), test=str(data), batch_size=2)
    splits = load_rows(config, make_tokenizer(), methods.get("tgdpo"))
    return types.SimpleNamespace(config=config, splits=splits, folders=folders, run=base, data=data)


def models_of(name, world):
    source, folders = SOURCES[name], world.folders
    given = {"cost_model": "cost", "sampler": "sampler", "positive": "positive", "negative": "negative"}
    found = {key: folders[given[key]] for key in source.models if key in given}
    if "model" in source.models:
        classes = source.heads.get("model") == ("token_classes",)
        found["model"] = folders["classes" if classes else "score" if "model" in source.heads else "guide"]
    return found


def values(name, loss, world, **settings):
    """The columns of the first pair, (T_chosen,) and (T_rejected,)."""
    import dataclasses

    chosen = {"name": name, **models_of(name, world), **settings}
    config = dataclasses.replace(world.config, credit=chosen, loss={"name": loss, "beta": 0.2})
    check_credit(config, methods.get(loss))
    rows = attach_credit(config, world.run, methods.get(loss), make_tokenizer(), world.splits)[0]
    field = next(f for f in FIELDS if f in methods.get(loss).needs)
    return [torch.tensor(rows[0][f"{side}_{field}"]) for side in ("chosen", "rejected")], rows


def reward_model(world, name="score"):
    from tokenpo.reward_models import RewardModel

    return RewardModel.from_pretrained(world.folders[name])


def batch_of(world):
    from tokenpo.data import PreferenceCollator

    return PreferenceCollator(pad_token_id=0)([world.splits[0][1][0]])


def logps(world, name, outputs=("logps",)):
    from transformers import LlamaForCausalLM

    with torch.no_grad():
        return response_stats(LlamaForCausalLM.from_pretrained(world.folders[name]).eval(), batch_of(world), outputs)


def same(found, expected):
    for side, row in zip(found, expected, strict=True):
        torch.testing.assert_close(side, row[: len(side)].float(), rtol=1e-4, atol=1e-5)


def test_every_registered_credit_function_has_a_name_or_a_reason():
    kinds = ("credit", "token_marks")
    assert {"gae", "prime_returns", "matchtir_advantages", "prime_released_returns"} <= set(SOURCES)
    registered = {n for n, m in methods.all_methods().items() if m.kind in kinds}
    assert not registered - {*SOURCES, *LIVE, *NOT_SOURCES}
    assert not {*SOURCES, *LIVE} & set(NOT_SOURCES)
    assert set(NOT_SOURCES) <= set(credit.__all__)
    assert all(len(reason.split()) > 3 for reason in NOT_SOURCES.values())


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_goes_under_every_loss_that_reads_rewards_or_weights(name, world):
    from tokenpo.data import PreferenceCollator
    from tokenpo.reference import make_reference

    policy = make_model(0)
    reference = make_reference("model:1", policy, load=lambda n: make_model(int(n)))
    _, with_rewards = values(name, "tgdpo", world)
    _, with_weights = values(name, "bmc", world)
    batches = [PreferenceCollator(pad_token_id=0)(list(rows)) for rows in (with_rewards, with_weights)]
    stats = [
        response_stats(policy, batch, ("logps", "ref_kl"), reference=lambda b: reference.score(policy, b))
        for batch in batches
    ]
    assert (stats[1].token_weights[stats[1].mask] >= 0).all()
    for loss in LOSSES:
        side = stats[0] if "token_rewards" in methods.get(loss).needs else stats[1]
        out = methods.configure(loss)(side[:3], side[3:])
        assert out.loss.isfinite() and torch.autograd.grad(out.loss, policy.lm_head.weight, retain_graph=True)[0].any()


def test_rto_pays_the_guide_the_penalty_and_the_score(world):
    guide, ref, old = (logps(world, n) for n in ("guide", "start", "sampler"))
    expected = credit.rto_rewards(old.logps, ref.logps, guide.logps, torch.tensor([1.0, 0.0]), guide.mask, dpo_coef=0.3)
    same(values("rto", "tgdpo", world, dpo_coef=0.3)[0], expected)
    scores = reward_model(world).scores(batch_of(world))
    with_model = values("rto_last", "tgdpo", world, reward_model=world.folders["score"])[0]
    assert [r.sum().item() for r in with_model] == pytest.approx(
        credit.rto_rewards(old.logps, ref.logps, guide.logps, scores, guide.mask).sum(-1).tolist(), abs=1e-5
    )


def test_rto_segment_pays_where_sentences_end(world):
    (chosen, rejected), _ = values("rto_segment", "tgdpo", world, kl_coef=0.0)
    assert chosen.nonzero().flatten().tolist() == [2, 5]  # 'aa.' and the end
    assert rejected.nonzero().flatten().tolist() == [4]


def test_sources_of_a_guide(world):
    guide, ref = logps(world, "guide"), logps(world, "start")
    for name, function in (("prime", credit.prime_rewards), ("implicit", credit.implicit_rewards)):
        same(values(name, "tgdpo", world, beta=0.7)[0], function(guide.logps, ref.logps, guide.mask, beta=0.7))
    process = credit.prime_rewards(guide.logps, ref.logps, guide.mask, beta=0.2)  # beta: the loss's
    returns = credit.prime_returns(process, torch.tensor([1.0, 0.0]), torch.tensor([0, 0]), guide.mask)
    same(values("prime_returns", "tgdpo", world)[0], returns)


def test_bellman_and_expected_rewards_read_the_whole_vocabulary(world):
    from transformers import LlamaForCausalLM

    batch, guide, ref = batch_of(world), logps(world, "guide"), logps(world, "start")
    models = [LlamaForCausalLM.from_pretrained(world.folders[n]).eval() for n in ("guide", "start")]
    with torch.no_grad():
        logits = [m(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits for m in models]
    start, width = int(batch["prompt_lengths"][0]), guide.mask.shape[1]
    before = [x[:, start - 1 : start - 1 + width] for x in logits]
    v = 0.2 * before[0].logsumexp(-1)
    same(values("bellman", "tgdpo", world)[0], credit.bellman_rewards(guide.logps, ref.logps, v, guide.mask, beta=0.2))
    p, q = (x.log_softmax(-1) for x in before)
    same(values("expected_implicit", "tgdpo", world)[0], -0.2 * (q.exp() * (q - p)).sum(-1))


def test_sources_of_a_reward_model(world):
    batch, mask = batch_of(world), logps(world, "start").mask
    score, cost = (reward_model(world, n).prefix_values(batch) for n in ("score", "cost"))
    same(
        values("red_two_models", "tgdpo", world, alpha=1.0)[0],
        credit.red_two_model_rewards(score, cost, mask, alpha=1.0),
    )
    last = credit.last_token_rewards(torch.tensor([1.0, 0.0]), mask)
    same(values("gae", "tgdpo", world, lam=0.9)[0], credit.gae(last, score[:, :-1], mask, lam=0.9)[0])
    chances = reward_model(world, "values").prefix_values(batch)
    same(values("gae", "tgdpo", world, model=world.folders["values"])[0], credit.gae(last, chances[:, :-1], mask)[0])
    same(values("potential_shaping", "tgdpo", world)[0], credit.potential_shaping(last, score[:, :-1], mask))
    (chosen, rejected), _ = values("last_token", "tgdpo", world, reward_model=world.folders["score"])
    assert [chosen[-1].item(), rejected[-1].item()] == pytest.approx(
        reward_model(world).scores(batch).tolist(), abs=1e-5
    )
    classes = reward_model(world, "classes")
    same(values("token_classifier", "tgdpo", world)[0], credit.token_class_rewards(classes(batch).logits[:, 1:], mask))
    same(values("reading", "tgdpo", world, model=world.folders["classes"])[0], classes.token_rewards(batch))


def test_segment_reward_fits_its_normaliser_to_the_training_split_once(world):
    from tokenpo.reward_models import fit_location_normaliser

    entropy = logps(world, "start", ("entropy",))
    head = reward_model(world).prefix_values(batch_of(world))[:, 1:]
    segments = credit.entropy_segments(entropy.entropy, entropy.mask, threshold=1.0)
    ends = credit.segment_ends(segments)
    counts = ends.sum(-1, keepdim=True).expand(ends.shape)[ends]
    numbers = fit_location_normaliser(head[ends].repeat(3), segments[ends].repeat(3), counts.repeat(3))._asdict()
    (world.run / "credit.json").unlink(missing_ok=True)
    found, _ = values("segment_reward", "tgdpo", world, threshold=1.0)
    wanted = dict(threshold=1.0, least_std=0.1, **numbers)
    same(found, credit.segment_rewards(head, entropy.entropy, entropy.mask, **wanted))
    assert json.loads((world.run / "credit.json").read_text())["normaliser"] == pytest.approx(numbers, rel=1e-4)
    plain, _ = values("segment_reward", "tgdpo", world, threshold=1.0, fit_pairs=0)
    same(plain, credit.segment_rewards(head, entropy.entropy, entropy.mask, threshold=1.0, least_std=0.1))


def brute_force(world, row, side):
    """Reward of every coalition of a response's tokens, by one sequence at a time."""
    from transformers import LlamaForSequenceClassification

    model = LlamaForSequenceClassification.from_pretrained(world.folders["score"]).eval()
    ids, prompt = row[f"{side}_ids"], row["prompt_ids"]
    rewards = []
    for m in range(2 ** len(ids)):
        kept = prompt + [token for i, token in enumerate(ids) if m >> i & 1]
        with torch.no_grad():
            rewards.append(model.score(model.model(torch.tensor([kept])).last_hidden_state[0, -1]).item())
    return rewards


def test_exact_shapley_is_that_of_every_coalition(world):
    found, rows = values("explainable_dense", "tgdpo", world, shapley_weight=0.6)
    for side, r in zip(("chosen", "rejected"), found, strict=True):
        v = brute_force(world, rows[0], side)
        n = len(r)
        phi = shapley(v, n)
        shape = torch.tensor(phi).softmax(-1)
        expected = v[-1] * (0.6 * shape + 0.4 * torch.nn.functional.one_hot(torch.tensor(n - 1), n))
        torch.testing.assert_close(r, expected.float(), rtol=1e-4, atol=1e-5)


def shapley(v, n):
    """Over all orders."""
    total = [0.0] * n
    orders = list(itertools.permutations(range(n)))
    for order in orders:
        m = 0
        for i in order:
            total[i] += v[m | 1 << i] - v[m]
            m |= 1 << i
    return [t / len(orders) for t in total]


def test_lime_and_sampled_shapley_do_not_depend_on_the_batch(world):
    import dataclasses

    settings = {"lime_weight": 0.5, "exact_tokens": 0, "permutations": 2, "lime_samples": 8}
    found, rows = values("explainable_dense", "tgdpo", world, **settings)
    scores = reward_model(world).scores(batch_of(world)).tolist()
    assert [r.sum().item() for r in found] == pytest.approx(scores, abs=1e-5)
    other = types.SimpleNamespace(**{**vars(world), "config": dataclasses.replace(world.config, batch_size=3)})
    again = values("explainable_dense", "tgdpo", other, **settings)[1]
    for row, twin in zip(rows, again, strict=True):
        assert row["rejected_token_rewards"] == pytest.approx(twin["rejected_token_rewards"], abs=1e-5)


def test_shape_weights_are_learned_and_written(world):
    (world.run / "credit.json").unlink(missing_ok=True)
    settings = {"lime_samples": 8, "permutations": 2, "trials": 6, "learn_pairs": 1}
    found, _ = values("explainable_dense", "tgdpo", world, **settings)
    learned = json.loads((world.run / "credit.json").read_text())["shape_weights"]
    parts = [learned[f"{part}_weight"] for part in ("shapley", "lime", "last")]
    assert sum(parts) == pytest.approx(1.0) and min(parts) >= 0 and -1 <= learned["correlation"] <= 1
    given = {k: learned[k] for k in ("shapley_weight", "lime_weight")}
    fixed, _ = values("explainable_dense", "tgdpo", world, lime_samples=8, permutations=2, **given)
    same(found, fixed)


def test_captum_is_asked_where_it_is_wanted(world, monkeypatch):
    """A stand-in with Captum's interface, exact: one order alone."""
    import sys

    class ShapleyValueSampling:
        def __init__(self, forward):
            self.forward = forward

        def attribute(self, inputs, baselines, n_samples):
            n = inputs.shape[1]
            steps = torch.tril(torch.ones(n, n), 0)
            scores = self.forward(torch.cat([baselines, steps]))
            assert n_samples == 3
            return scores.diff().unsqueeze(0)

    attr = types.ModuleType("captum.attr")
    attr.ShapleyValueSampling = ShapleyValueSampling
    monkeypatch.setitem(sys.modules, "captum", types.ModuleType("captum"))
    monkeypatch.setitem(sys.modules, "captum.attr", attr)
    settings = {"shapley_weight": 1.0, "exact_tokens": 0, "permutations": 3, "explainer": "captum"}
    (chosen, _), rows = values("explainable_dense", "tgdpo", world, **settings)
    v = brute_force(world, rows[0], "chosen")
    gains = torch.tensor([v[2 ** (i + 1) - 1] - v[2**i - 1] for i in range(len(chosen))])
    torch.testing.assert_close(chosen, v[-1] * gains.softmax(-1), rtol=1e-4, atol=1e-5)


def test_attention_of_the_steps_and_of_a_reward_model(world):
    from transformers import LlamaForCausalLM

    batch = batch_of(world)
    model = LlamaForCausalLM.from_pretrained(world.folders["guide"], attn_implementation="eager").eval()
    with torch.no_grad():
        a = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_attentions=True)
    heads, start = a.attentions[-1].mean(1)[0], int(batch["prompt_lengths"][0])
    n = int(batch["response_lengths"][0])
    weights = heads[start - 1 + n - 1, start : start + n - 1]  # the step that wrote the last token, on those before it
    weights = torch.cat([weights / weights.sum(), torch.zeros(1)])
    found, _ = values("abc_d_last", "tgdpo", world, beta=1.0)
    torch.testing.assert_close(found[0], weights, rtol=1e-4, atol=1e-6)
    assert found[1].abs().sum() == 0
    import dataclasses

    config = dataclasses.replace(
        world.config, credit={"name": "abc", "reward_model": world.folders["score"]}, loss={"name": "tgdpo"}
    )
    rows = attach_credit(config, world.run, methods.get("tgdpo"), make_tokenizer(), world.splits)[0]
    scores = reward_model(world).scores(batch)
    assert sum(rows[0]["chosen_token_rewards"]) == pytest.approx(scores[0].item(), abs=1e-5)
    body = reward_model(world).network.model
    body.set_attn_implementation("eager")
    with torch.no_grad():
        a = body(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_attentions=True)
    row = a.attentions[-1].mean(1)[0, start + n - 1, start : start + n]
    expected = scores[0] * (0.8 * row / row.sum() + 0.2 * torch.nn.functional.one_hot(torch.tensor(n - 1), n))
    assert rows[0]["chosen_token_rewards"] == pytest.approx(expected.tolist(), abs=1e-5)


def test_variants_of_spans(world):
    get = lambda name, **settings: values(name, "tgdpo", world, **settings)[0][1].tolist()
    assert get("span_severity") == [-5, -5, -5.5, -0.5, 0]
    assert get("span_severity_worst") == [-5, -5, -5, -0.5, 0]
    assert get("span_severity_mildest") == [-5, -5, -0.5, -0.5, 0]
    assert get("span_severity_divided", minor=-3) == pytest.approx([-5 / 3, -5 / 3, -5 / 3 - 0.75, -0.75, 0])


def test_a_model_without_attention_is_refused_by_its_field(world, tmp_path, capsys):
    from transformers import MambaConfig, MambaForCausalLM

    sizes = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 1, "vocab_size": 36}
    MambaForCausalLM(MambaConfig(**sizes)).save_pretrained(tmp_path / "mamba")
    make_tokenizer().save_pretrained(tmp_path / "mamba")
    words = ["train", f"model={world.folders['start']}", f"train={world.data}", f"output={tmp_path / 'o'}"]
    assert main([*words, "loss.name=tgdpo", "credit.name=abc", f"credit.model={tmp_path / 'mamba'}"]) == 2
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert "credit.model" in error and "attention" in error, error


def test_tool_calls_are_rewarded_at_the_end_of_their_turn(world):
    (chosen, rejected), _ = values("matchtir", "tgdpo", world)
    assert chosen.tolist() == [0, 1, 0, 0, 0, 1]  # 'aa' | '.' of a tool | ' e' and the end
    one = (1 + 0.5 + 1) / 4  # name, half of the names of parameters, one value of two
    assert rejected.tolist() == [0, 0, 0, 0, pytest.approx(one)]
    (chosen, rejected), _ = values("matchtir_advantages", "tgdpo", world, gamma=1.0)
    assert chosen[2] == 0 and (chosen[[0, 1, 3, 4, 5]] > 0).all() and (rejected < 0).all()
    transported, _ = values("matchtir", "tgdpo", world, matching="transport")
    assert transported[0].sum() < 1.01


@pytest.mark.parametrize(
    ("loss", "name", "convert", "expected"),
    [
        ("tgdpo", "modified_tokens", None, ([1.0] * 5 + [0.0], [-1.0] * 4 + [0.0])),
        ("tgdpo", "modified_tokens", "unsigned", ([1.0] * 5 + [0.0], [1.0] * 4 + [0.0])),
        ("bmc", "last_token", "min_max", ([0.0] * 5 + [1.0], [0.0] * 5)),
        ("bmc", "last_token", "absolute", ([0.0] * 5 + [6.0], [1.0] * 5)),
        ("critical_dpo", "uniform", None, ([1.0] * 6, [1.0] * 5)),
    ],
)
def test_rewards_become_weights_and_weights_rewards(loss, name, convert, expected, world):
    found, _ = values(name, loss, world, **({"convert": convert} if convert else {}))
    if name == "modified_tokens":
        found = [(side != 0).float() * side for side in found]
        assert {*found[0].tolist()} <= {0.0, 1.0} and found[0].any()
        sign = -1.0 if convert is None else 1.0
        assert {*found[1].tolist()} <= {0.0, sign} and found[1].any()
        return
    assert [side.tolist() for side in found] == [pytest.approx(e) for e in expected]


def test_softmax_weights_have_mean_one_and_turn_round_on_rejected_rows():
    r, mask = torch.tensor([[1.0, 0.0, 9.0], [1.0, 0.0, 9.0]]), torch.tensor([[True, True, False]] * 2)
    w = credit.softmax_weights(r, torch.tensor([1.0, -1.0]), mask)
    e = 2 * torch.tensor([1.0, 0.0]).softmax(0)
    torch.testing.assert_close(w, torch.tensor([[e[0], e[1], 0.0], [e[1], e[0], 0.0]]))
    assert {name for table in CONVERSIONS.values() for name in table} == {
        "softmax", "min_max", "absolute", "signed", "unsigned"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["credit.name=gae", "credit.model=START"], ["credit.model", "no reward model", "score"]),
        (["credit.name=gae"], ["gae", "credit.model=FOLDER"]),
        (["credit.name=red_two_models", "credit.model=SCORE"], ["red_two_models", "credit.cost_model=FOLDER"]),
        (["credit.name=red", "credit.model=CLASSES"], ["token_classes", "last_token or prefixes or values"]),
        (["credit.name=token_classifier", "credit.model=SCORE"], ["last_token", "token_classes"]),
        (["credit.name=rto", "credit.dpo_coef=-1"], ["rto", "dpo_coef", "[0, inf)"]),
        (["credit.name=rto", "credit.reward_model=START"], ["credit.reward_model", "no reward model"]),
        (["credit.name=span_severity_worst"], ["row 0", "chosen_error_spans"]),
        (["credit.name=matchtir"], ["matchtir", "gold_calls"]),
        (["credit.name=matchtir", "credit.matching=best"], ["matching", "optimal"]),
        (["credit.name=explainable_dense", "credit.model=SCORE", "credit.exact_tokens=20"], ["exact_tokens", "16"]),
        (["credit.name=modified_tokens", "credit.convert=softmax"], ["credit.convert", "signed"]),
        (["credit.name=uniform", "credit.convert=softmax"], ["uniform", "convert"]),
    ],
)
def test_what_a_source_misses_is_named_before_anything_trains(words, parts, world, tmp_path, capsys):
    plain = write_jsonl(tmp_path / "plain.jsonl", make_pairs(6))
    named = {key.upper(): folder for key, folder in world.folders.items()}
    words = [next((f"{w.split('=')[0]}={f}" for k, f in named.items() if w.endswith(f"={k}")), w) for w in words]
    output = tmp_path / "o"
    code = main(
        ["train", f"model={world.folders['start']}", f"train={plain}", f"output={output}", "loss.name=tgdpo", *words]
    )
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert code == 2 and all(part in error for part in parts), error
    assert not list(output.glob("*/model")) and not (output / "checkpoints").exists()


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"chosen_turns": [{"start": 0, "end": 2}, {"start": 2, "end": 5}]}, ["row 0", "chosen_turns", "2 turns"]),
        ({"chosen_turns": [{"start": 0, "end": 9}]}, ["row 0", "chosen_turns", "outside the text"]),
        ({"chosen_turns": [{"start": 0, "end": 2}]}, ["row 0", "chosen_predicted_calls", "turn 1", "chosen_turns"]),
        ({"gold_calls": [{"parameters": "{}"}]}, ["row 0", "gold_calls", "name"]),
    ],
)
def test_bad_tool_rows_are_refused_by_row_and_column(changes, parts, world, tmp_path, capsys):
    data = write_jsonl(tmp_path / "bad.jsonl", [{**PAIR, **CALLS, **changes}] * 4)
    words = ["train", f"model={world.folders['start']}", f"train={data}", f"test={data}", f"output={tmp_path / 'o'}"]
    assert main([*words, "loss.name=tgdpo", "credit.name=matchtir"]) == 2
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert all(part in error for part in parts), error


def test_a_run_writes_its_credit_into_the_summary(world, tmp_path):
    run = tmp_path / "run"
    words = ["train", f"model={world.folders['start']}", f"train={world.data}", f"test={world.data}", "samples=0"]
    more = [
        "max_steps=1",
        f"output={run}",
        "loss.name=bmc",
        "credit.name=red",
        f"credit.model={world.folders['score']}",
    ]
    assert main([*words, *more]) == 0
    assert json.loads((run / "summary.json").read_text())["credit"] == {
        "name": "red", "fields": ["token_weights"], "beta_c": 1.0, "convert": "softmax",
        "model": world.folders["score"],
    }  # fmt: skip


def test_weights_of_kls_in_the_data_reach_the_loss(world, tmp_path):
    rows, names = make_pairs(6), itertools.product(("chosen", "rejected"), ("token_weights", "kl_weights"))
    for (side, field), row in itertools.product(list(names), rows):
        row[f"{side}_{field}"] = [0.5] * (len(row[side]) + 1)
    run, data = tmp_path / "run", write_jsonl(tmp_path / "own.jsonl", rows)
    words = ["train", f"model={world.folders['start']}", f"train={data}", f"output={run}", "max_steps=1", "samples=0"]
    assert main([*words, "loss.name=sparsepo"]) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["credit"] == {"name": "columns of the data", "fields": ["token_weights", "kl_weights"]}
    assert not (run / "model" / "companion.safetensors").exists()
    assert summary["held_out"]["token/zero_kl_weights_chosen"] == 0.0
    assert set(ENGINES) >= {"pairwise", "pairwise_with_prompt"}


def test_a_killed_run_does_not_compute_its_values_again(world, tmp_path, monkeypatch):
    from tokenpo.commands import reader

    own = types.SimpleNamespace(**{**vars(world), "run": tmp_path})
    first, _ = values("red", "tgdpo", own)
    (table,) = tmp_path.glob("credit.parquet")
    before = table.stat().st_mtime_ns
    monkeypatch.setattr(reader.RewardModel, "from_pretrained", lambda *_: pytest.fail("read again"))
    same(values("red", "tgdpo", own)[0], first)
    assert table.stat().st_mtime_ns == before
    monkeypatch.undo()
    os.utime(world.folders["score"] + "/config.json")
    values("red", "tgdpo", own)
    assert table.stat().st_mtime_ns > before
    halved, _ = values("red", "tgdpo", own, beta_c=0.5)
    assert not torch.equal(halved[0], first[0])
    rows = own.splits[0][0].map(lambda row: {**row, "chosen_reward": 4.0})
    other = types.SimpleNamespace(**{**vars(own), "splits": [(rows, own.splits[0][1]), own.splits[1]]})
    assert values("last_token", "tgdpo", own)[0][0].sum() == 1
    assert values("last_token", "tgdpo", other)[0][0].sum() == 4
