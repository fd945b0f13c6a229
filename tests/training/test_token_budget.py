"""Micro-batches by a budget of tokens: every row once, never over the budget, the same for any number of processes."""

import random

import pytest
import torch
from tiny import make_model, make_pairs, make_tokenizer
from transformers import TrainingArguments

from tokenpo.data import load_preferences, tokenize_preferences
from tokenpo.training import PreferenceTrainer
from tokenpo.training.sampling import FILLER, EpochSampler, TokenBudgetSampler
from tokenpo.training.trainer import _tokens

rng = random.Random(0)
LENGTHS = [rng.choice([8, 20, 40, 90, 300]) + i % 7 for i in range(211)]


def batches(sampler, epoch=0):
    sampler.epoch = epoch
    rows = list(sampler)
    assert len(rows) == len(sampler) and len(rows) % sampler.batch_size == 0
    return [rows[i : i + sampler.batch_size] for i in range(0, len(rows), sampler.batch_size)]


@pytest.mark.parametrize("processes", [1, 3])
def test_every_row_once_and_within_the_budget(processes):
    sampler = TokenBudgetSampler(LENGTHS, tokens=200, batch_size=8, processes=processes, seed=5)
    first, second = batches(sampler), batches(sampler, epoch=1)
    for found in (first, second):
        assert sorted(i for batch in found for i in batch if i != FILLER) == list(range(len(LENGTHS)))
        assert len(found) % processes == 0
        for batch in found:
            rows = [LENGTHS[i] for i in batch if i != FILLER]
            assert not rows or max(rows) * len(rows) <= 200 or len(rows) == 1
    assert first != second and first == batches(sampler)
    several = [{frozenset(b) for b in found if len(set(b) - {FILLER}) > 2} for found in (first, second)]
    assert len(several[0]) > 15 and len(several[0] & several[1]) <= 2  # an epoch deals anew


def test_rows_of_a_micro_batch_are_alike_in_length():
    plain = EpochSampler(len(LENGTHS), multiple=1, seed=5, shuffle=True)
    order = list(plain)
    sampler = TokenBudgetSampler(LENGTHS, tokens=10_000, batch_size=8, processes=1, seed=5)

    def padding(found):
        found = [[LENGTHS[i] for i in batch if i != FILLER] for batch in found]
        return sum(max(rows) * len(rows) - sum(rows) for rows in found) / sum(LENGTHS)

    assert padding([order[i : i + 8] for i in range(0, len(order), 8)]) > 0.9
    assert padding(batches(sampler)) < 0.35


def test_processes_of_a_step_get_like_micro_batches():
    sampler = TokenBudgetSampler(LENGTHS, tokens=200, batch_size=8, processes=2, seed=0)
    found = batches(sampler)
    for ours, theirs in zip(found[::2], found[1::2], strict=True):
        longest = [max((LENGTHS[i] for i in batch if i != FILLER), default=0) for batch in (ours, theirs)]
        assert min(longest) == 0 or max(longest) <= 2 * min(longest) + 20


def make_trainer(folder, **options):
    tokenizer = make_tokenizer()
    rows = tokenize_preferences(load_preferences(make_pairs(23)), tokenizer, max_length=64)
    args = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, gradient_accumulation_steps=2, num_train_epochs=2,
        learning_rate=1e-2, logging_steps=1, save_steps=3, report_to="none", disable_tqdm=True, use_cpu=True, seed=3,
    )  # fmt: skip
    return PreferenceTrainer(make_model(0), args, train_dataset=rows, tokenizer=tokenizer, loss="tdpo2", **options)


def test_a_trainer_sees_each_pair_once_an_epoch_and_counts_what_it_sees(tmp_path, monkeypatch):
    seen = []
    before = PreferenceTrainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = before(self, model, inputs, *args, **kwargs)
        seen.append(
            (int((~inputs["filler"]).sum()), inputs["input_ids"].numel(), kwargs["num_items_in_batch"]["pairs"])
        )
        return loss

    monkeypatch.setattr(PreferenceTrainer, "compute_loss", compute_loss)
    trainer = make_trainer(tmp_path, tokens_per_batch=200)
    trainer.train()
    assert sum(pairs for pairs, *_ in seen) == 2 * 23
    assert all(numel <= 200 or pairs <= 1 for pairs, numel, _ in seen)
    epochs = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    windows = [epoch[i : i + 2] for epoch in epochs for i in range(0, len(epoch), 2)]
    for window in windows:
        assert {int(count) for *_, count in window} == {sum(pairs for pairs, *_ in window)}
    assert trainer.state.global_step == len(windows)


def test_resuming_gives_the_same_weights(tmp_path):
    whole = make_trainer(tmp_path / "whole", tokens_per_batch=200)
    whole.train()
    again = make_trainer(tmp_path / "again", tokens_per_batch=200)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for ours, theirs in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_sharing_does_not_change_a_run(tmp_path):
    shared, unshared = (make_trainer(tmp_path / str(s), share_prompts=s) for s in ("auto", False))
    for trainer in (shared, unshared):
        trainer.train()
    assert list(shared.sharing.verdicts.values()) == [True, True] and not len(unshared.sharing.verdicts)
    for ours, theirs in zip(shared.state.log_history, unshared.state.log_history, strict=True):
        assert ours.get("loss", 0.0) == pytest.approx(theirs.get("loss", 0.0), rel=1e-3)


def test_what_a_pair_takes():
    assert _tokens({"prompt_ids": [1] * 5, "chosen_ids": [1] * 3, "rejected_ids": [1] * 4}) == 18
    assert (
        _tokens({"chosen_prompt_ids": [1] * 9, "rejected_prompt_ids": [1], "chosen_ids": [1], "rejected_ids": [1]})
        == 20
    )
