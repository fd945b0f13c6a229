"""A cached reference says what the reference says: bit for bit, or within bounds that are themselves checked."""

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import make_model, make_pairs, make_tokenizer

from tokenpo.data import PreferenceCollator, load_preferences, tokenize_preferences
from tokenpo.errors import InputError, MissingInputError
from tokenpo.reference import Reference, cache, make_reference, start_difference
from tokenpo.reference.build import build, entries, faults
from tokenpo.reference.store import Store
from tokenpo.statistics import LinearHead, StoredValues, kl_bounds, linear_token_stats, response_states, response_stats

KLS = ("ref_kl", "policy_kl")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rows():
    return tokenize_preferences(load_preferences(make_pairs(3)), make_tokenizer())


@pytest.fixture(scope="module")
def batch(rows):
    return PreferenceCollator(pad_token_id=0)([rows[i] for i in range(3)])


def statistics(policy, batch, reference, outputs=("logps",)):
    return response_stats(policy, batch, outputs, reference=functools.partial(reference.score, policy))


def prepared(folder, model, rows, **settings):
    return cache.prepare(folder, model, make_tokenizer(), {"train": rows}, **settings)


def lora(model, **options):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("keep", ["logps", "hidden"])
def test_log_probs_are_the_references_bit_for_bit(keep, dtype, rows, batch, tmp_path):
    start, policy = make_model().to(dtype), make_model(1).to(dtype)
    live = make_reference("copy", start)
    stored = prepared(tmp_path, start, rows, keep=keep)
    found, expected = statistics(policy, batch, stored), statistics(policy, batch, live)
    assert found.ref_logps.dtype == expected.ref_logps.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(found.ref_logps, expected.ref_logps) and torch.equal(found.logps, expected.logps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_give_exact_kls_and_gradients(dtype, rows, batch, tmp_path):
    start, policy = make_model().to(dtype), make_model(1).to(dtype)
    live, stored = make_reference("copy", start), prepared(tmp_path, start, rows, keep="hidden")
    gradients = []
    for reference in (live, stored):
        stats = statistics(policy, batch, reference, KLS)
        policy.zero_grad()
        (stats.ref_kl + 2 * stats.policy_kl).sum().backward()
        gradients.append([p.grad.clone() for p in policy.parameters()])
    found, expected = statistics(policy, batch, stored, KLS), statistics(policy, batch, live, KLS)
    for name in KLS:
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_head_stays_where_the_reference_was(rows, batch, tmp_path):
    """All weights train, the head among them: the cache's copy must not move with it."""
    policy = make_model()
    live, stored = make_reference("copy", policy), prepared(tmp_path, policy, rows, keep="hidden")
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.1)
    found, expected = statistics(policy, batch, stored, KLS), statistics(policy, batch, live, KLS)
    assert torch.equal(found.ref_kl, expected.ref_kl) and found.ref_kl.max() > 0.01


@pytest.mark.parametrize("head", [{}, {"bias": True, "scale": 0.5, "softcap": 3.0}])
def test_top_tokens_bound_the_kls(head):
    torch.manual_seed(0)
    n, d, vocabulary, k = 40, 8, 60, 6
    weight = torch.randn(2, vocabulary, d)
    bias = torch.randn(2, vocabulary) if head.get("bias") else (None, None)
    make = lambda i: LinearHead(weight[i], bias[i], head.get("scale", 1.0), head.get("softcap"))
    hidden, ref_hidden, tokens = torch.randn(n, d), torch.randn(n, d), torch.randint(vocabulary, (n,))
    exact = linear_token_stats(
        hidden, make(0), tokens, outputs=(*KLS, "ref_logps"), ref_hidden=ref_hidden, ref_head=make(1)
    )
    stored = StoredValues.of(ref_hidden, make(1), tokens, k)
    torch.testing.assert_close(stored.logps, exact["ref_logps"])
    top = stored.top
    for name, (lower, upper) in kl_bounds(top, hidden, make(0)).items():
        assert (lower <= exact[name] + 1e-5).all() and (exact[name] <= upper + 1e-5).all(), name
        assert (lower > 0.2 * exact[name]).float().mean() > 0.5, "a bound that says something"
    q = make(1).logits(ref_hidden).log_softmax(-1)
    torch.testing.assert_close(top.rest.exp(), 1 - q.exp().topk(k).values.sum(-1))
    torch.testing.assert_close(top.least, q.min(-1).values)
    torch.testing.assert_close(top.entropy, -(q.exp() * q).sum(-1))
    assert torch.equal(top.ids, q.topk(k).indices)


def test_all_tokens_but_one_give_the_exact_kl():
    torch.manual_seed(0)
    head, ref_head = LinearHead(torch.randn(12, 4)), LinearHead(torch.randn(12, 4))
    hidden, ref_hidden = torch.randn(9, 4), torch.randn(9, 4)
    tokens = torch.arange(9)
    exact = linear_token_stats(hidden, head, tokens, outputs=KLS, ref_hidden=ref_hidden, ref_head=ref_head)
    bounds = kl_bounds(StoredValues.of(ref_hidden, ref_head, tokens, 11).top, hidden, head)
    for name in KLS:
        for bound in bounds[name]:
            torch.testing.assert_close(bound, exact[name], rtol=1e-5, atol=1e-5)


def test_lumped_kls_are_the_lower_bounds_and_so_are_their_gradients(rows, batch, tmp_path):
    """Against the same sum written with dense logits, through the whole model, the head included."""
    start, policy = make_model(), make_model(1)
    stored = prepared(tmp_path, start, rows, keep="topk", k=5)
    found = {}
    for dense in (False, True):
        policy.zero_grad()
        if dense:
            states = response_states(policy, batch, functools.partial(stored.score, policy))
            top, log_p = states.ref_values.top, states.head.logits(states.hidden).log_softmax(-1)
            inside = log_p.gather(1, top.ids)
            p = torch.cat([inside, (1 - inside.exp().sum(1, keepdim=True)).log()], 1)
            q = torch.cat([top.logps, top.rest[:, None]], 1)
            kls = [(q.exp() * (q - p)).sum(1), (p.exp() * (p - q)).sum(1)]
        else:
            stats = statistics(policy, batch, stored, KLS)
            kls = [stats.ref_kl[stats.mask], stats.policy_kl[stats.mask]]
        (kls[0].sum() + 2 * kls[1].sum()).backward()
        found[dense] = [*kls, *(p.grad for p in policy.parameters())]
    for ours, theirs in zip(found[False], found[True], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_values_that_are_not_kept_are_refused(rows, batch, tmp_path):
    policy = make_model()
    stored = prepared(tmp_path, policy, rows)
    with pytest.raises(MissingInputError, match="'ref_kl' needs more than the reference's log-probs"):
        statistics(policy, batch, stored, ("ref_kl",))
    with pytest.raises(InputError, match=r"stored at temperature 1, not 0\.5"):
        response_stats(policy, batch, reference=functools.partial(stored.score, policy), temperature=0.5)
    with pytest.raises(InputError, match="a cached reference has no model to call"):
        stored.states(policy, batch)
    with pytest.raises(InputError, match="k must be at least 1 and below the vocabulary's 35 tokens, got 35"):
        prepared(tmp_path / "k", policy, rows, keep="topk", k=35)
    with pytest.raises(InputError, match="keep 'all' is unknown"):
        prepared(tmp_path / "all", policy, rows, keep="all")


@pytest.mark.parametrize("trained", [False, True])
def test_adapters_are_cached_as_they_are_at_the_start(trained, rows, batch, tmp_path):
    model = lora(make_model())
    if trained:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.3)
    expected = response_stats(model, batch).logps
    stored = prepared(tmp_path, model, rows, keep="hidden")
    assert stored.mode == ("cache of start" if trained else "cache of adapter-off") and stored.equal_at_start
    assert start_difference(model, stored, batch) < 1e-6
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2)
    torch.testing.assert_close(statistics(model, batch, stored).ref_logps, expected, rtol=0, atol=1e-6)
    assert start_difference(model, stored, batch) > 0.01
    assert model.active_adapter == "default" and not model.base_model.lm_head.weight.requires_grad


def test_full_and_adapter_off_share_one_store(rows, tmp_path):
    prepared(tmp_path, make_model(), rows)
    told = []
    prepared(tmp_path, lora(make_model()), rows, tell=lambda progress: told.append(dataclasses.replace(progress)))
    assert [p.computed for p in told] == [0] and told[0].kept == 6


def test_autocast_is_that_of_a_reference_that_is_computed(rows, batch, tmp_path):
    start = make_model()
    stored = prepared(tmp_path, start, rows, keep="hidden", autocast=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert start_difference(start, stored, batch) == 0.0
    assert start_difference(start, stored, batch) > 1e-4


def test_only_what_is_missing_or_damaged_is_computed(rows, tmp_path):
    model, calls = make_model(), []
    first = rows.select(range(2))
    counting = dataclasses.replace(cache.source_of("auto", model))
    states = counting.states
    object.__setattr__(counting, "states", lambda m, b: calls.append(len(b["input_ids"])) or states(m, b))
    store = cache.open_store(tmp_path, counting, model, make_tokenizer(), keep="logps")
    made = functools.partial(build, store, counting, model, batch_size=4)
    assert made(list(entries(first, "train"))).computed == 4 and calls == [4]
    assert made(list(entries(rows, "train"))).kept == 4 and calls == [4, 2]
    assert made([*entries(rows, "train"), *entries(rows, "test")]).computed == 0 and calls == [4, 2]
    damaged = next(entries(rows, "train")).key
    with store.env.begin(write=True) as transaction:
        transaction.put(damaged, transaction.get(damaged)[:-1])
    again = made(list(entries(rows, "train")))
    assert (again.damaged, again.computed, again.kept) == (1, 1, 5) and calls == [4, 2, 1]


def test_shares_of_processes_are_disjoint_and_whole(rows, tmp_path):
    model = make_model()
    source = cache.source_of("auto", model)
    wanted = list(entries(rows, "train"))
    for part in range(3):
        store = cache.open_store(tmp_path / str(part), source, model, make_tokenizer(), keep="logps")
        build(store, source, model, wanted, batch_size=2, part=(part, 3))
    keys = [set(Store(tmp_path / str(part)).keys()) for part in range(3)]
    assert set.union(*keys) == {entry.key for entry in wanted} and sum(map(len, keys)) == len(wanted)


def test_a_reference_that_says_nan_is_named_by_row_and_token(rows, tmp_path):
    model = make_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[rows[1]["rejected_ids"][2]] = float("nan")
    source = cache.source_of("auto", model)
    store = cache.open_store(tmp_path, source, model, make_tokenizer(), keep="logps")
    entry = list(entries(rows, "train"))[3]
    with pytest.raises(InputError, match=r"train row 1, rejected: the reference's logps at response token \d+ hold"):
        build(store, source, model, [entry], batch_size=1)
    assert len(store) == 0


def test_a_stored_nan_is_refused_when_it_is_read(rows, batch, tmp_path):
    model = make_model()
    stored = prepared(tmp_path, model, rows)
    store = Store(tmp_path)
    entry = next(entries(rows, "train"))
    (record,) = store.get([entry.key], [entry.name])
    record["logps"][1] = float("inf")
    store.put({entry.key: record})
    with pytest.raises(
        InputError, match=r"row 0 of the batch, read from .*: the reference's logps at response token 1"
    ):
        statistics(model, batch, stored)
    assert faults(store, {entry.key: entry.name}) == ["train row 0, chosen: a record with nan or inf"]


def test_a_row_that_was_never_stored_is_refused(rows, batch, tmp_path):
    stored = prepared(tmp_path, make_model(), rows.select([0, 1]))
    with pytest.raises(InputError, match="has no record for row 2 of the batch"):
        statistics(make_model(), batch, stored)


def test_two_prompts_a_row_are_two_sequences(tmp_path):
    prompts = {"chosen_prompt_ids": [1, 5], "rejected_prompt_ids": [1, 6, 7]}
    rows = [{**prompts, "chosen_ids": [8, 2], "rejected_ids": [8, 2]}]
    model = make_model()
    stored = prepared(tmp_path, model, rows)
    batch = PreferenceCollator(pad_token_id=0)(rows)
    found = statistics(model, batch, stored).ref_logps
    assert torch.equal(found, response_stats(model, batch).logps) and not torch.equal(found[0], found[1])


def test_a_reference_gives_states_or_values(rows, batch, tmp_path):
    model = make_model()
    live = make_reference("copy", model)
    assert isinstance(live, Reference) and live.stored is None
    hidden, head = live.score(model, batch)
    assert hidden.dim() == 3 and head.weight.shape == (35, 32)
    kept, _ = prepared(tmp_path / "hidden", model, rows, keep="hidden").score(model, batch)
    assert kept.shape == (int(batch["response_lengths"].sum()), 32)
    values = prepared(tmp_path / "logps", model, rows).score(model, batch)
    assert values.logps.shape == kept.shape[:1] and values.top is None


def test_a_build_survives_kills_at_random_moments(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "reference_cache.py"),
        "--kills",
        "6",
        "--folder",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])["kills"]
    assert found["kills"] == 6 and found["rows_finished_before_a_kill"] > 0
    assert found["corrupt_accepted"] == found["missing_accepted"] == found["finished_rows_computed_again"] == 0
