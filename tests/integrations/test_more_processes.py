"""What a method samples for itself: in two processes that cut a group the same rows and gradients as in one."""

import pytest
from rl_run import close_gradients, in_two_processes
from sampled_run import DULL, sampled_run


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return in_two_processes("sampled_run.py", tmp_path_factory.mktemp("two"))


def all_but_advantages(row):
    return {name: value for name, value in row.items() if name != "advantages"}


def compared(both, name, folder):
    """What one process found and either of two, after all that must be equal was."""
    one, (first, second) = sampled_run(folder, name, 1), (found[name] for found in both)
    in_order = sorted([*first["rows"], *second["rows"]], key=lambda row: row["step"])
    assert len(in_order) == len(one["rows"]) and {row["step"] for row in in_order} == {0, 1, 2}
    for a, b in zip(one["rows"], in_order, strict=True):
        assert all_but_advantages(a) == all_but_advantages(b)
        assert b["advantages"] == pytest.approx(a["advantages"], rel=1e-5, abs=1e-6)
    assert first["losses"] == second["losses"] == pytest.approx(one["losses"], abs=1e-6)
    close_gradients(one["gradients"], first["gradients"], name)
    groups = [{(row["step"], row["group"]) for row in found["rows"]} for found in (first, second)]
    assert len(groups[0] & groups[1]) == (0 if name == "tree" else 3)
    assert len({str(row["advantages"]) for row in one["rows"]}) > len(one["rows"]) / 3
    return one, first, second


def test_values_of_cuts(both, tmp_path):
    """Prefixes that rows of a cut group share are continued in each process."""
    one, first, _ = compared(both, "chain", tmp_path)
    assert any(row["loss_mask"].count(False) for row in one["rows"])
    for a, b in zip(one["sampled"], first["sampled"], strict=True):
        assert 0 < a["sampling/prefixes"] <= b["sampling/prefixes"]
        assert b["sampling/responses"] == 2 * b["sampling/prefixes"]


def test_groups_sampled_again(both, tmp_path):
    """Whole groups and the one that is cut get other prompts, the same in both processes."""
    one, first, _ = compared(both, "groups", tmp_path)
    assert one["sampled"] == first["sampled"] and sum(log["sampling/attempts"] for log in one["sampled"]) > 2
    replaced = [row for row in one["rows"] if row["drawn"] != row["prompt"]]
    cut = [row for row in replaced if row["group"] == 1]
    assert 0 < len(cut) < len(replaced) < len(one["rows"]) and {row["drawn"] for row in replaced} <= {*DULL}
    for start in range(0, len(one["rows"]), 4):
        group = one["rows"][start : start + 4]
        assert len({row["prompt"] for row in group}) == 1 and len({str(row["tokens"]) for row in group}) > 1


def test_trees(both, tmp_path):
    """A tree a process, of unlike shape: some segments end the response, where others branch."""
    one, first, _ = compared(both, "tree", tmp_path)
    assert one["sampled"] == first["sampled"]
    leaves = [row["reward"] is not None for row in one["rows"]]
    assert any(leaves[i : i + 8] != leaves[i + 8 : i + 16] for i in range(0, len(leaves), 16))


def test_a_tree_that_is_cut_is_refused_in_both_processes(both):
    sentence = "the 4 rows of a process must be a multiple of num_generations = 8"
    assert [sentence in str(found["cut"]) for found in both] == [True, True]


def test_aapo_asks_for_a_prompt_once_over_all_processes(both, tmp_path):
    """Later batches hold prompts of earlier ones, and new ones."""
    one, first, second = compared(both, "aapo", tmp_path)
    assert first["asked"] == second["asked"] == one["asked"]
    asked = [prompt for call in one["asked"] for prompt in call]
    assert sorted(asked) == sorted({*asked}) and len(one["asked"]) == 2
    assert first["remembered"] == second["remembered"] == one["remembered"]
    (remembered,) = one["remembered"]
    assert [*remembered] == asked and all(len(rewards) == 4 for rewards in remembered.values())
