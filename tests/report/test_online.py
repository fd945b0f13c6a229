"""An online run's report: completions with the advantages they were trained with, and text that stays text."""

import json

import pytest
from hostile import HOSTILE

from tokenpo.cli import main
from tokenpo.errors import InputError
from tokenpo.report import online_report, pieces, render, run_report
from tokenpo.report.online import locate

METRICS = [
    {"step": 1, "loss": 0.5, "reward": 0.25, "entropy": 0.9, "clip/low": 0.0, "clip/high": 0.125, "kl/reference": 0.0},
    {"step": 2, "loss": 0.4, "reward": 0.75, "entropy": 0.8, "clip/low": 0.25, "clip/high": 0.0, "kl/reference": 0.5},
]


def rollout(step, prompt, tokens, advantages, reward=1.0, completion=None):
    text = "".join(tokens) if completion is None else completion
    return {"step": step, "prompt": prompt, "completion": text, "reward": reward, "tokens": tokens,
            "advantages": advantages}  # fmt: skip


ROLLOUTS = [
    rollout(0, "say it:", ["no", "<eos>"], [-1.5, -0.5], -2.0, "no"),
    rollout(1, "say it:", ["a", " b"], [0.0, 0.25]),
    rollout(2, "say it:", ["yes", " sir", "<eos>"], [0.5, -0.25, 1.0], 3.0, "yes sir"),
    rollout(2, "say it:", ["so"], [-0.75], None),
    rollout(2, "then:", ["x"], [2.0], 0.5),
]


@pytest.fixture
def make_run(tmp_path):
    def make(rollouts=tuple(ROLLOUTS), name="online"):
        run = tmp_path / name
        run.mkdir()
        summary = {"advantages": ["grpo", {"name": "a3po"}], "objective": {"name": "ppo_clip", "kl_coef": 0.1},
                   "steps": 3, "before": None, "after": None, "versions": {"trl": "1.16.0"}}  # fmt: skip
        (run / "config.json").write_text(json.dumps({"task": "online", "seed": 7}))
        (run / "summary.json").write_text(json.dumps(summary))
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in METRICS))
        if rollouts:
            (run / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rollouts))
        return run

    return make


def test_inspect_shows_the_last_and_the_first_update_of_an_online_run(make_run, capsys):
    run = make_run()
    assert main(["inspect", str(run), "show=1"]) == 0
    said = capsys.readouterr().out
    assert "completion 1 · reward +3.00" in said and "advantage: sum +1.25; <eos> +1.00, yes +0.50, sir -0.25" in said
    assert "then:" not in said
    rows = [json.loads(line) for line in (run / "tokens.jsonl").read_text().splitlines()]
    assert [(row["group"], row["prompt"], row["text"], row["advantage"]) for row in rows] == [
        (0, "say it:", "yes sir", [0.5, -0.25, 1.0]),
        (0, "say it:", "so", [-0.75]),
        (1, "then:", "x", [2.0]),
        (2, "say it:", "no", [-1.5, -0.5]),
    ]
    assert (rows[0]["starts"], rows[0]["ends"]) == ([0, 3, -1], [3, 7, -1])
    page = (run / "report.html").read_text()
    for part in ("3 tokens · reward +3.00", "1 tokens · no reward", "update 3", "update 1", '"signed":true', "1.16.0",
                 "grpo + a3po under ppo_clip (kl_coef=0.1)", "<dt>seed</dt><dd>7</dd>"):  # fmt: skip
        assert part in page, part
    assert "update 2" not in page


def test_curves_of_an_online_run(make_run):
    panels = {panel.title: panel.series for panel in run_report(make_run()).panels}
    assert panels == {
        "reward": {"training": [(1, 0.25), (2, 0.75)]},
        "entropy, nats a token": {"training": [(1, 0.9), (2, 0.8)]},
        "KL, nats a token": {"to the reference": [(1, 0.0), (2, 0.5)]},
        "share of tokens held by a clip": {"low": [(1, 0.0), (2, 0.25)], "high": [(1, 0.125), (2, 0.0)]},
        "loss": {"training": [(1, 0.5), (2, 0.4)]},
    }


def test_before_and_after_of_an_online_run(make_run):
    run = make_run()
    summary = json.loads((run / "summary.json").read_text())
    summary["before"] = {"reward": 0.5, "reward_interval": [0.25, 0.75], "kl": 0.0}
    summary["after"] = {"reward": None, "reward_interval": None, "kl": 0.125}
    (run / "summary.json").write_text(json.dumps(summary))
    (table,) = online_report(run).tables
    assert table.rows == [
        ["reward of sampled text", "0.50  [0.25, 0.75]", "none"],
        ["exact KL to the start, nats a text", "0.00", "0.12"],
    ]


def test_pairs_limits_completions_and_a_run_that_kept_none_is_shown(make_run):
    found = online_report(make_run(), completions=2)
    assert [[r.text for r in group.responses] for group in found.groups] == [["yes sir", "so"]]
    bare = make_run((), "bare")
    assert main(["inspect", str(bare)]) == 0
    assert "no completions were kept" in (bare / "report.html").read_text()


def test_text_of_a_rollout_cannot_leave_its_place(make_run):
    kept = [text for text in HOSTILE if "\ud800" not in text]
    run = make_run([rollout(0, text, [text, text], [1.0, -1.0]) for text in kept])
    assert main(["inspect", str(run), "pairs=100", f"show={len(kept)}"]) == 0
    page = (run / "report.html").read_text()
    body = page[page.index("<main") : page.index("</main>")]
    for mark in ("<script>window", "<img", "<svg", "<style", "</title", "<iframe", "<base", "<meta", "<a href", "<h1"):
        assert mark not in body, mark
    assert "&lt;script&gt;window.pwned=1&lt;/script&gt;" in body and body.count("<article") == len(kept)
    assert page == render(online_report(run, completions=100))


def test_messages_are_text_and_advantages_of_no_number_have_no_colour(make_run):
    prompt = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    row = rollout(0, prompt, ["hi"], [float("nan")], completion=[{"role": "assistant", "content": "hi"}])
    (group,) = online_report(make_run([row])).groups
    assert (group.prompt, group.responses[0].text) == ("system: be kind\nuser: hello", "hi")


@pytest.mark.parametrize(
    ("tokens", "text", "spans"),
    [
        (["Hello", "there", "</s>"], "Hello there", [(0, 5), (5, 11), (-1, -1)]),  # the space was lost
        (["a", "\ufffd", "\ufffd", " b"], "a日 b", [(0, 1), (1, 2), (1, 2), (2, 4)]),  # two tokens of a character
        (["\ufffd", "\ufffd", "<eos>"], "é", [(0, 1), (0, 1), (-1, -1)]),
        (["<think>", "so"], "so", [(-1, -1), (0, 2)]),
    ],
)
def test_tokens_are_found_in_their_text(tokens, text, spans):
    assert locate(tokens, text) == spans


def test_a_text_that_the_tokens_do_not_tell_is_shown_as_sampled(make_run):
    row = rollout(0, "p", ["<call>", "f", "(1)"], [1.0, 2.0, 3.0], completion=[{"role": "assistant", "content": ""}])
    (group,) = online_report(make_run([row])).groups
    assert group.responses[0].text == "<call>f(1)" and len(pieces(group.responses[0])) == 3


@pytest.mark.parametrize("line", ['{"step": 1, "pro', '{"step": 0, "tokens": ["a"], "advantages": []}', "[]"])
def test_a_broken_line_is_named(make_run, line):
    run = make_run()
    with open(run / "rollouts.jsonl", "a") as file:
        file.write(line)
    with pytest.raises(InputError, match=r"rollouts\.jsonl, line 6 is no rollout"):
        online_report(run)


def test_settings_of_pairs_are_refused_for_an_online_run(make_run, capsys):
    run = make_run()
    assert main(["inspect", str(run), "credit=implicit"]) == 2
    assert "credit does not fit" in capsys.readouterr().err
    assert not (run / "report.html").exists()


def test_a_run_of_another_kind_is_named(make_run):
    run = make_run()
    (run / "config.json").write_text("{}")
    with pytest.raises(InputError, match="run of another kind"):
        run_report(run)
