"""`tokenpo bench losses`: exact figures, equal KL, the rule for a difference, the whole command at a tiny size."""

import itertools
import json
import math

import pytest
import torch

from tokenpo.cli import main
from tokenpo.evaluation import frontier_curves as curves
from tokenpo.evaluation.frontier_claims import CLAIMS, Claim, found_of
from tokenpo.evaluation.frontier_ladders import KINDS, arguments_of, ladder, loss_of, offline_losses
from tokenpo.evaluation.frontier_losses import ENGINES
from tokenpo.evaluation.frontier_page import GROUPS, groups_of
from tokenpo.evaluation.frontier_policy import Measured, States, best_logits, measure
from tokenpo.evaluation.frontier_task import Task, batches, make_start
from tokenpo.evaluation.frontier_train import descend, make_scene, train, train_companions
from tokenpo.statistics import dense_token_stats

START = Measured(0.0, 1.0, 2.0)
TINY = Task(length=4, pairs=64, held_out=32, batch_size=8, steps=8, start_steps=60, checkpoints=2)


def root(kl, gain=3.0):
    """The front reward = 1 + gain * sqrt(KL), with entropy 2 - sqrt(KL) / 4."""
    return Measured(kl, 1.0 + gain * math.sqrt(kl), 2.0 - math.sqrt(kl) / 4)


@pytest.fixture(scope="module")
def tiny():
    start = make_start(TINY, 0)
    train_companions(start)
    return start


# Equal KL, areas, differences


def test_reward_at_equal_kl_is_exact_on_a_front_that_grows_with_the_root_of_kl():
    points = [root(kl) for kl in (0.5, 2.0, 8.0)]
    for kl in (0.1, 0.5, 1.0, 3.0, 8.0):
        assert curves.at_kl(points, START, kl) == pytest.approx(1 + 3 * math.sqrt(kl), abs=1e-12)
        assert curves.at_kl(points, START, kl, "entropy") == pytest.approx(2 - math.sqrt(kl) / 4, abs=1e-12)


def test_reward_beyond_the_furthest_policy_is_not_made_up_and_behind_the_best_one_stays():
    points = [root(1.0), root(4.0), Measured(9.0, 0.0, 0.1)]
    assert curves.at_kl(points, START, 8.0) == root(4.0).reward  # the policy at 9 lost reward: 8 nats allow that at 4
    assert math.isnan(curves.at_kl(points, START, 9.5))
    assert curves.at_kl([Measured(2.0, -5.0, 1.0)], START, 1.0) == START.reward


def test_beaten_and_not_finite_policies_are_not_on_the_front():
    points = [root(1.0), Measured(1.5, 0.5, 1.0), Measured(math.nan, math.nan, math.nan), root(2.0)]
    assert curves.front(points, START) == [START, root(1.0), root(2.0)]


def test_a_difference_is_called_one_only_when_the_paired_interval_excludes_zero():
    theirs = [5.0, 1.0, 9.0, 3.0, 7.0]
    above = curves.difference([t + g for t, g in zip(theirs, (0.1, 0.2, 0.3, 0.2, 0.1), strict=True)], theirs)
    assert above.verdict == "higher" and above.value == pytest.approx(0.18) and above.low > 0
    around = curves.difference([t + g for t, g in zip(theirs, (0.1, -0.2, 0.3, 0.2, -0.1), strict=True)], theirs)
    assert around.verdict == "no difference shown" and around.low < 0 < around.high
    assert curves.difference(theirs, theirs).verdict == "no difference shown"
    below = curves.difference([t - 1 for t in theirs], theirs)
    assert below.verdict == "lower" and below.as_list() == pytest.approx([-1.0, -1.0])


def test_few_seeds_or_seeds_that_did_not_go_so_far_show_no_difference():
    four = curves.difference([2.0, 2.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0])
    assert four.value == 1.0 and math.isnan(four.low) and four.verdict == "no difference shown"
    gaps = curves.difference([2.0, math.nan, 2.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0, 1.0])
    assert gaps.value == 1.0 and gaps.verdict == "no difference shown"
    assert math.isnan(curves.difference([math.nan], [1.0]).value)


def test_verdicts_at_several_kls_join_and_meet_the_claim():
    higher, lower = (curves.difference([s] * 5, [0.0] * 5) for s in (1.0, -1.0))
    none = curves.difference([0.0] * 5, [0.0] * 5)
    assert curves.verdict([none, higher]) == "higher" and curves.verdict([lower, none]) == "lower"
    assert curves.verdict([higher, lower]) == "mixed" and curves.verdict([none]) == "no difference shown"
    nowhere = curves.difference([math.nan] * 5, [1.0] * 5)
    assert curves.verdict([nowhere]) == "not reached" and curves.verdict([nowhere, lower]) == "lower"
    claim = Claim("better")
    assert found_of(claim, "not reached") == "not reached"
    assert found_of(claim, "higher") == "shown" and found_of(claim, "lower") == "opposite shown"
    assert found_of(claim, "no difference shown") == "not shown" and found_of(claim, "mixed") == "mixed"
    assert found_of(Claim("says nothing", expected=None), "higher") == "higher"


def test_summary_sets_a_loss_beside_the_optimum():
    starts = {0: START, 1: START}
    best = {s: [root(kl / 50) for kl in range(1, 400)] for s in starts}
    ours = {0: [root(1.0, 1.5), root(4.0, 1.5)], 1: [root(1.0, 3.0), root(4.0, 3.0)]}
    finals = {s: rows[-1:] for s, rows in ours.items()}
    found = curves.summarise(ours, finals, starts, best, kls=[1.0, 4.0], limit=5.0)
    assert found["area"]["seeds"] == pytest.approx([(3 * 1.5 + 1 * 3) / 5, (3 * 3 + 1 * 6) / 5])
    assert found["hypervolume"]["seeds"] == pytest.approx([7.5, 15.0])
    assert found["final_area"]["seeds"] == pytest.approx([3.0 / 5, 6.0 / 5])
    assert found["share"]["seeds"][1] == pytest.approx(3 / 4.47, abs=0.01)  # mean of 3 sqrt(KL) over 0..5: 4.47
    assert found["reward@4"]["seeds"] == [4.0, 7.0] and found["reward@4"]["value"] == 5.5


# Exact figures of a policy


def responses(states):
    return torch.tensor(list(itertools.product(range(states.letters), repeat=states.length)))


def row_logps(logits, states, condition, tokens):
    where = states.of(torch.full((len(tokens),), condition), tokens)
    return logits.log_softmax(-1)[where].gather(-1, tokens[..., None]).squeeze(-1).sum(-1)


def test_reward_kl_and_entropy_are_those_of_every_response_enumerated():
    states = States(letters=3, length=3)
    torch.manual_seed(0)
    logits, reference = torch.randn(2, states.count, 3, dtype=torch.float64)
    worths = torch.tensor([[1.0, 0.0, -1.0], [-1.0, 0.0, 1.0]], dtype=torch.float64)
    tokens, kl, reward, entropy = responses(states), 0.0, 0.0, 0.0
    for condition in (0, 1):
        p, q = (row_logps(table, states, condition, tokens) for table in (logits, reference))
        kl += float((p.exp() * (p - q)).sum()) / 2
        reward += float((p.exp() * worths[condition][tokens].sum(-1)).sum()) / 2
        entropy += float(-(p.exp() * p).sum()) / 2 / 3
    assert measure(logits, reference, worths, states) == pytest.approx((kl, reward, entropy), abs=1e-10)


def test_optimum_reaches_the_free_energy_that_bounds_every_policy():
    """max E[reward] - beta KL = beta log E_reference[exp(reward / beta)], per condition."""
    states, beta = States(letters=3, length=3), 0.7
    torch.manual_seed(1)
    reference = torch.randn(states.count, 3, dtype=torch.float64)
    worths = torch.tensor([[1.0, 0.0, -1.0], [-1.0, 0.0, 1.0]], dtype=torch.float64)
    tokens, bound = responses(states), 0.0
    for condition in (0, 1):
        score = worths[condition][tokens].sum(-1)
        bound += beta * float(torch.logsumexp(row_logps(reference, states, condition, tokens) + score / beta, 0)) / 2
    best = measure(best_logits(reference, worths, states, beta), reference, worths, states)
    assert best.reward - beta * best.kl == pytest.approx(bound, abs=1e-10)
    for seed in range(5):
        torch.manual_seed(seed)
        other = measure(reference + torch.randn_like(reference), reference, worths, states)
        assert other.reward - beta * other.kl < bound


def test_statistics_over_states_are_those_of_the_tokens(tiny):
    scene = make_scene("tdpo2", {"beta": 1.0}, tiny, tiny.train)
    scene.rows = torch.arange(6)
    torch.manual_seed(3)
    logits = scene.ref_logits + torch.randn_like(scene.ref_logits)
    states, tokens = TINY.states.of(scene.conditions, scene.tokens), scene.tokens
    found = scene.stats(logits, scene.conditions, tokens)
    everywhere = torch.ones_like(tokens, dtype=torch.bool)
    outputs = ("logps", "ref_logps", "ref_kl")
    wanted = dense_token_stats(logits[states], tokens, everywhere, ref_logits=scene.ref_logits[states], outputs=outputs)
    for name in outputs:
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name))


def test_reference_is_close_to_the_chain_and_companions_know_which_responses_are_better(tiny):
    assert 0 <= tiny.kl_to_chain < 0.3
    here = measure(tiny.ref_logits, tiny.ref_logits, tiny.worths, TINY.states)
    assert here.kl == 0.0
    rewards = {n: measure(t, tiny.ref_logits, tiny.worths, TINY.states).reward for n, t in tiny.companions.items()}
    assert rewards["guide"] > here.reward > rewards["reverse"]
    assert rewards["positive"] > rewards["negative"]


# Every loss


def test_every_offline_loss_is_in_with_its_claim_and_its_panel():
    from tokenpo import methods
    from tokenpo.training import ENGINES as OF_MODELS

    assert set(KINDS) == set(ENGINES) == set(OF_MODELS)
    registered = {n for n, m in methods.all_methods().items() if m.kind in OF_MODELS}
    assert registered == {loss_of(name).name for name in offline_losses()} and registered < set(offline_losses())
    assert set(CLAIMS) == set(offline_losses()) - {"dpo"}
    assert {claim.against for claims in CLAIMS.values() for claim in claims} <= set(offline_losses())
    assert "others" not in groups_of(offline_losses())
    assert groups_of(["dpo", "mine"]) == {"others": ["mine"]}
    assert sum(map(len, GROUPS.values())) == len(offline_losses()) - 1


@pytest.mark.parametrize("name", offline_losses())
def test_every_loss_moves_the_policy_and_is_measured(name, tiny):
    found = train(name, 1.0, tiny)
    assert [p[0] for p in found["points"]] == [6.0, 8.0]
    assert all(math.isfinite(x) for p in found["points"] for x in p) and 0 <= found["accuracy"] <= 1
    assert found["points"][-1][1] > 1e-6  # its KL: it went somewhere
    assert set(found["arguments"]) == set(loss_of(name).defaults)


def test_strength_means_further_for_every_loss():
    for name in offline_losses():
        steps = ladder(name, 16)
        assert (steps.value(2.0) > steps.value(1.0)) == steps.rising
        if steps.argument is not None:
            assert arguments_of(name, 2.0, 16)[steps.argument] == steps.value(2.0)
    assert ladder("simpo", 16).value(1.0) == 16.0 and ladder("ipo", 32).value(1.0) == 4.0


def test_losses_that_are_dpo_by_another_route_take_its_path(tiny):
    paths = [descend(name, arguments_of(name, 1.0, 4), tiny)[1] for name in ("dpo", "ld_dpo", "dpo_norm")]
    for path in paths[1:]:
        for ours, theirs in zip(path, paths[0], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)


def test_pairs_come_in_one_order_for_all_losses_and_in_another_for_another_seed():
    once, again, other = (list(batches(TINY, seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert not torch.equal(torch.cat(once), torch.cat(other))
    assert sorted(torch.cat(once).tolist()) == list(range(TINY.pairs))  # eight steps of eight pairs: one pass


# The command


def words(folder, *more):
    return ["bench", "losses", "only=[dpo,tdpo2]", "strengths=[0.5,2]", "seeds=2", "steps=8", "pairs=64", "length=4",
            "workers=0", f"output={folder}", f"page={folder}/page/frontier.md", *more]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "run"
    assert main(words(folder)) == 0
    return folder


def result(folder):
    return json.loads((folder / "result.json").read_text())


def test_whole_command_writes_result_page_and_picture(finished):
    found = result(finished)
    assert set(found["losses"]) == {"dpo", "tdpo2"} and found["strengths"] == [0.5, 2.0]
    assert found["checks"]["policies"] == 2 * 2 * 2 * 5 and found["checks"]["excess"] <= 1e-6
    assert found["losses"]["dpo"]["against_dpo"] is None
    against = found["losses"]["tdpo2"]["against_dpo"]
    assert set(against["at"]) == {f"reward@{kl}" for kl in ("0.125", "0.25", "0.5", "1", "2")}
    assert against["verdict"] == "not reached"  # in eight steps
    assert found["losses"]["dpo"]["ends"]["2"]["kl"] > found["losses"]["dpo"]["ends"]["0.5"]["kl"]
    page = (finished / "page" / "frontier.md").read_text()
    assert "only=[dpo,tdpo2]" in page and "`tdpo2` | " in page and "](frontier.png)" in page
    assert (finished / "page" / "frontier.png").stat().st_size > 10_000
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table[:4]}) == 1


def test_run_again_nothing_is_computed_and_a_lost_cell_comes_back_the_same(finished, capsys):
    cells = sorted((finished / "cells").glob("*.json"))
    assert len(cells) == 2 + 2 * 2 * 2
    before, times = result(finished), {c: c.stat().st_mtime_ns for c in cells}
    assert main(words(finished)) == 0
    assert {c: c.stat().st_mtime_ns for c in cells} == times and result(finished) == before
    (finished / "cells" / "tdpo2-x2-s1.json").unlink()
    (finished / "start-s1.pt").unlink()
    from tokenpo.commands.bench_losses import start_of

    start_of.cache_clear()
    assert main(words(finished)) == 0
    assert result(finished) == before
    assert "tdpo2, reward at equal KL against dpo: not reached" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("only=[tpdo2]", "unknown offline loss 'tpdo2': did you mean 'tdpo2'"),
        ("strengths=[0]", "strengths must be positive, got 0.0"),
        ("seeds=0", "seeds must be at least 1, got 0"),
        ("steps=3", "steps must be at least 8"),
        ("pairs=7", "pairs must be at least 32"),
    ],
)
def test_mistakes_are_one_sentence_before_anything_trains(wrong, said, tmp_path, capsys):
    assert main(["bench", "losses", wrong, f"output={tmp_path}/run"]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_another_task_in_the_same_folder_is_refused(finished, capsys):
    assert main([w.replace("steps=8", "steps=16") for w in words(finished)]) == 2
    assert "steps was 8, now 16" in capsys.readouterr().err
