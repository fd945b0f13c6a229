"""ORPO with the prompt's likelihood trains: one forward, the same numbers as three, whatever the micro-batches."""

import json

import pytest
import torch
from exact_run import Keep
from test_exactness import assert_same
from tiny import make_model, make_pairs, make_tokenizer, write_jsonl
from transformers import TrainingArguments

from tokenpo.cli import main
from tokenpo.data import load_preferences, tokenize_preferences
from tokenpo.losses import orpo_loss, orpo_with_prompt_loss
from tokenpo.statistics import response_stats
from tokenpo.training import PreferenceTrainer, engines


def make_trainer(folder, batch=4, accumulate=1, keep=None):
    args = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
        max_steps=4, learning_rate=1e-2, max_grad_norm=0.0, logging_steps=1, save_strategy="no", report_to="none",
        disable_tqdm=True, use_cpu=True, optim="sgd", lr_scheduler_type="constant", seed=3,
        per_device_eval_batch_size=3,
    )  # fmt: skip
    rows = tokenize_preferences(load_preferences(make_pairs(11)), make_tokenizer(), max_length=64)
    return PreferenceTrainer(
        make_model(0), args, train_dataset=rows, eval_dataset=rows, tokenizer=make_tokenizer(),
        loss="orpo_with_prompt", reference="none", callbacks=[keep] if keep else None,
    )  # fmt: skip


def test_it_is_called_with_both_sides_and_the_prompt(tmp_path):
    trainer = make_trainer(tmp_path)
    rows = [trainer.train_dataset[i] for i in range(3)] + [trainer.train_dataset[-1]] * 2
    batch = trainer.data_collator(rows)
    out = engines.ENGINES["pairwise_with_prompt"](trainer, trainer.model, batch)
    plain = trainer.data_collator(rows[:3])
    stats = response_stats(trainer.model, plain)
    ones = torch.ones(3, dtype=torch.int64)
    first = {k: plain[k][:3] for k in ("input_ids", "attention_mask")}
    prompt = response_stats(
        trainer.model, {**first, "prompt_lengths": ones, "response_lengths": plain["prompt_lengths"][:3] - 1}
    )
    expected = orpo_with_prompt_loss(stats[:3], stats[3:], prompt)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-6, atol=0)
    assert abs(expected.loss - orpo_loss(stats[:3], stats[3:]).loss) > 1e-3
    counts = trainer.count_units(batch)
    total = sum(value / counts[unit] for unit, value in out.sums.items())
    torch.testing.assert_close(total, out.loss, rtol=1e-6, atol=0)
    for name, value in expected.metrics.items():
        torch.testing.assert_close(out.metrics[name], value, rtol=1e-5, atol=1e-6)


def test_micro_batches_add_up_to_the_batch(tmp_path):
    def run(name, batch, accumulate):
        keep = Keep()
        trainer = make_trainer(tmp_path / name, batch, accumulate, keep)
        trainer.train()
        evaluation = trainer.evaluate()
        wanted = ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies")
        return {"losses": keep.losses, "gradients": keep.gradients, "eval": {k: evaluation[k] for k in wanted}}

    assert_same(run("small", 1, 4), run("whole", 4, 1), 2e-6)


def test_a_batch_of_fillers_alone_has_no_loss_but_a_gradient(tmp_path):
    trainer = make_trainer(tmp_path)
    out = engines.ENGINES["pairwise_with_prompt"](
        trainer, trainer.model, trainer.data_collator([trainer.train_dataset[-1]])
    )
    assert all(total.item() == 0.0 for total in out.sums.values())
    out.loss.backward()


def test_it_trains_by_name(model_folder, tmp_path):
    run, data = tmp_path / "run", write_jsonl(tmp_path / "pairs.jsonl", make_pairs(12))
    words = ["train", f"model={model_folder}", f"train={data}", f"output={run}", "max_steps=3", "samples=0"]
    assert main([*words, "batch_size=4", "learning_rate=0.003", "loss.name=orpo_with_prompt"]) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["reference"] == "none" and summary["held_out"]["loss"] == pytest.approx(summary["held_out"]["loss"])
    assert summary["credit"] is None
