"""Every credit source of the command line gives its rewards under tgdpo, and says what it misses before training."""

import itertools
import json

import pytest
import torch
from tiny import make_model, make_pairs, make_tokenizer, write_jsonl

from tokenpo.cli import main
from tokenpo.commands.config import TrainConfig
from tokenpo.commands.credit import attach_credit
from tokenpo.commands.rows import load_rows
from tokenpo.methods import get


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory):
    from transformers import LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("rm")
    config = make_model().config
    config.num_labels = 1
    torch.manual_seed(3)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def spans_file(tmp_path):
    rows = make_pairs(12)
    for row in rows:
        row["chosen_error_spans"] = []
        row["rejected_error_spans"] = [{"start": 0, "end": 1, "severity": "major"}]
    return write_jsonl(tmp_path / "spans.jsonl", rows)


def rewards(model_folder, data, run, **credit):
    """(rows, chosen rewards, rejected rewards) of the training split."""
    config = TrainConfig(model=str(model_folder), train=str(data), loss={"name": "tgdpo"}, credit=credit, batch_size=5)
    rows = attach_credit(
        config, run, get("tgdpo"), make_tokenizer(), load_rows(config, make_tokenizer(), get("tgdpo"))
    )[0]
    for row in rows:
        for side in ("chosen", "rejected"):
            assert len(row[f"{side}_token_rewards"]) == len(row[f"{side}_ids"])
    return rows, rows["chosen_token_rewards"], rows["rejected_token_rewards"]


def test_sequence_rewards_are_one_and_zero_or_the_datas(model_folder, pairs_file, tmp_path):
    _, chosen, rejected = rewards(model_folder, pairs_file, tmp_path, name="uniform")
    assert all(sum(r) == pytest.approx(1.0) for r in chosen) and all(sum(r) == 0.0 for r in rejected)
    own = write_jsonl(
        tmp_path / "own.jsonl", [{**p, "chosen_reward": 3.0, "rejected_reward": -2.0} for p in make_pairs(6)]
    )
    _, chosen, rejected = rewards(model_folder, own, tmp_path, name="last_token")
    assert all(r[-1] == 3.0 and sum(r) == 3.0 for r in chosen) and all(r[-1] == -2.0 for r in rejected)


def test_red_differences_the_reward_model_on_prefixes(model_folder, reward_folder, pairs_file, tmp_path):
    from transformers import LlamaForSequenceClassification

    rows, chosen, _ = rewards(model_folder, pairs_file, tmp_path, name="red", model=str(reward_folder))
    model = LlamaForSequenceClassification.from_pretrained(reward_folder).eval()
    row = rows[2]

    def value(ids):
        with torch.no_grad():
            return model.score(model.model(torch.tensor([ids])).last_hidden_state[:, -1]).item()

    prefixes = [value(row["prompt_ids"] + row["chosen_ids"][:n]) for n in range(len(row["chosen_ids"]) + 1)]
    expected = [b - a for a, b in itertools.pairwise(prefixes)]
    assert chosen[2] == pytest.approx(expected, abs=1e-5)


def test_abc_spreads_the_reward_by_attention(model_folder, pairs_file, tmp_path):
    _, chosen, rejected = rewards(model_folder, pairs_file, tmp_path, name="abc", beta=1.0)
    assert all(sum(r) == pytest.approx(1.0, abs=1e-5) for r in chosen)
    assert any(max(r) - min(r) > 1e-3 for r in chosen if len(r) > 3), "attention should not be uniform"
    assert all(sum(r) == 0 for r in rejected)


def test_edits_mark_what_differs(model_folder, tmp_path):
    rows = [{"prompt": "say:", "chosen": "abc x def", "rejected": "abc yy def"}] * 4
    data = write_jsonl(tmp_path / "edits.jsonl", rows)
    _, chosen, rejected = rewards(model_folder, data, tmp_path, name="minimal_edits")
    assert chosen[0] == [0, 0, 0, 0, 1, 0, 0, 0, 0, 0] and rejected[0] == [0, 0, 0, 0, -1, -1, 0, 0, 0, 0, 0]


def test_spans_reach_the_tokens_they_cover(model_folder, spans_file, tmp_path):
    _, chosen, rejected = rewards(model_folder, spans_file, tmp_path, name="span_severity", major=-4)
    assert all(set(r) == {0.0} for r in chosen)
    assert all(r[0] == -4.0 and set(r[1:]) <= {0.0} for r in rejected)


@pytest.mark.parametrize("name", ["uniform", "red", "minimal_edits", "contrastive_prompt"])
def test_a_named_source_trains_under_tgdpo(name, model_folder, reward_folder, pairs_file, tmp_path):
    run = tmp_path / "run"
    words = ["train", f"model={model_folder}", f"train={pairs_file}", f"output={run}", "max_steps=3", "samples=0"]
    model = [f"credit.model={reward_folder}"] if name == "red" else []
    assert main([*words, "loss.name=tgdpo", f"credit.name={name}", *model]) == 0
    assert json.loads((run / "summary.json").read_text())["steps"] == 3


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["loss.name=tgdpo", "credit.name=red"], ["red", "credit.model=FOLDER"]),
        (["loss.name=tgdpo", "credit.name=rad"], ["rad", "'red'"]),
        (["loss.name=sparsepo", "credit.name=uniform"], ["uniform", "kl_weights", "sparsepo_common"]),
        (["loss.name=tgdpo", "credit.name=uniform", "credit.beta=1"], ["uniform", "beta"]),
        (["loss.name=dpo", "credit.name=uniform"], ["dpo"]),
        (["loss.name=tgdpo", "credit.name=span_severity"], ["row 0", "chosen_error_spans"]),
    ],
)
def test_what_is_missing_is_named(words, parts, model_folder, pairs_file, tmp_path, capsys):
    output = tmp_path / "o"
    assert main(["train", f"model={model_folder}", f"train={pairs_file}", f"output={output}", *words]) == 2
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert all(part in error for part in parts), error
    assert not (output / "model").exists()


@pytest.mark.parametrize(
    ("start", "end", "severity", "part"), [(0, 99, "minor", "outside the text"), (0, 1, "grave", "severity 'grave'")]
)
def test_bad_spans_are_refused_by_row_and_column(start, end, severity, part, model_folder, tmp_path, capsys):
    rows = [{**p, "chosen_error_spans": [], "rejected_error_spans": []} for p in make_pairs(6)]
    rows[4]["rejected_error_spans"] = [{"start": start, "end": end, "severity": severity}]
    data = write_jsonl(tmp_path / "bad.jsonl", rows)
    words = ["train", f"model={model_folder}", f"train={data}", f"test={data}", f"output={tmp_path / 'o'}"]
    code = main([*words, "loss.name=tgdpo", "credit.name=span_severity"])
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert code == 2 and part in error and "row 4" in error and "rejected_error_spans" in error, error


def test_another_tokenizer_is_refused(model_folder, reward_folder, pairs_file, tmp_path, capsys):
    import shutil

    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path / "rm2"
    shutil.copytree(reward_folder, folder)
    other = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "a": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=other, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    words = ["train", f"model={model_folder}", f"train={pairs_file}", f"output={tmp_path / 'o'}", "loss.name=tgdpo"]
    assert main([*words, "credit.name=red", f"credit.model={folder}"]) == 2
    assert "different tokenizers" in capsys.readouterr().err


def test_values_in_the_data_need_no_guide(model_folder, tmp_path):
    rows = make_pairs(8)
    for row in rows:
        for side in ("chosen", "rejected"):
            row[f"{side}_token_rewards"] = [0.1] * (len(row[side]) + 1)
    data, run = write_jsonl(tmp_path / "own.jsonl", rows), tmp_path / "run"
    words = ["train", f"model={model_folder}", f"train={data}", f"output={run}", "max_steps=2", "samples=0"]
    assert main([*words, "loss.name=tgdpo"]) == 0
    assert not (run / "guide").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_reward_that_is_no_number_is_named_by_its_row_before_training(bad, model_folder, tmp_path, capsys):
    rows = make_pairs(8)
    for row in rows:
        for side in ("chosen", "rejected"):
            row[f"{side}_token_rewards"] = [0.1] * (len(row[side]) + 1)
    rows[5]["rejected_token_rewards"][0] = bad
    data, run = write_jsonl(tmp_path / "own.jsonl", rows), tmp_path / "run"
    words = ["train", f"model={model_folder}", f"train={data}", f"output={run}", "max_steps=2", "samples=0"]
    assert main([*words, "loss.name=tgdpo"]) == 2
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert "row 5" in error and "'rejected_token_rewards'" in error and "token 0" in error, error
    assert not (run / "checkpoints").exists()


def test_contrastive_scores_hold_the_logits_of_few_rows_at_a_time(model_folder, tmp_path, monkeypatch):
    from tokenpo import credit
    from tokenpo.statistics import LinearHead

    other = tmp_path / "other"
    make_model(seed=1).save_pretrained(other)
    make_tokenizer().save_pretrained(other)
    pairs = [{"prompt": "say:", "chosen": "a", "rejected": "bcd fgh " * n} for n in (12, 9, 14, 2, 11, 10)]
    data = write_jsonl(tmp_path / "long.jsonl", pairs)
    settings = {"name": "contrastive_scores", "contrast": 0.5, "positive": str(model_folder), "negative": str(other)}
    config = TrainConfig(
        model=str(model_folder), train=str(data), test=str(data), loss={"name": "critical_dpo"}, credit=settings,
        batch_size=6, max_length=200,
    )  # fmt: skip
    held, whole = [], LinearHead.logits
    monkeypatch.setattr(LinearHead, "logits", lambda self, x: held.append(x.numel() // x.shape[-1]) or whole(self, x))
    loss = get("critical_dpo")
    rows = attach_credit(config, tmp_path, loss, make_tokenizer(), load_rows(config, make_tokenizer(), loss))[0]
    assert max(held) == 256 and sum(held) > 2 * 256, "T is 112 and six rows are counted"
    positive, negative = make_model().eval(), make_model(seed=1).eval()
    for row in rows:
        ids = torch.tensor([row["prompt_ids"] + row["rejected_ids"]])
        own = torch.tensor([row["rejected_ids"]])
        with torch.no_grad():
            logits = [model(ids).logits[:, -own.shape[1] - 1 : -1] for model in (positive, negative)]
        expected = 1 - credit.contrastive_scores(*logits, own, torch.ones_like(own).bool(), beta=0.5)[0]
        assert row["rejected_token_weights"] == pytest.approx(expected.tolist(), abs=1e-5)
        assert set(row["chosen_token_weights"]) == {1.0}
