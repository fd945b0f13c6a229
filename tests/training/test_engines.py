"""From a batch to a loss: the rows, models and counts that each kind is called with."""

import math

import pytest
import torch
from exact_run import Keep
from test_exactness import assert_same
from tiny import make_model, make_pairs, make_tokenizer
from transformers import TrainingArguments

from tokenpo.data import load_preferences, tokenize_preferences
from tokenpo.data.two_prompts import mapl_rows, meet_rows, tokenize_two_prompts
from tokenpo.errors import InputError
from tokenpo.losses import aligndistil_loss, aligndistil_theorem1_loss, kto_loss
from tokenpo.reference import make_reference
from tokenpo.statistics import response_stats
from tokenpo.training import PreferenceTrainer, engines
from tokenpo.types import TokenStats

PAIRS = 13


def rows_for(loss):
    tokenizer, pairs = make_tokenizer(), make_pairs(PAIRS)
    if loss == "mapl_intra":
        return tokenize_two_prompts(mapl_rows(pairs), tokenizer, max_length=200).select(range(PAIRS))
    if loss == "meet":
        return tokenize_two_prompts(meet_rows(pairs, length=1), tokenizer, max_length=64)
    return tokenize_preferences(load_preferences(pairs), tokenizer, max_length=64)


def make_trainer(folder, loss, batch=4, accumulate=1, keep=None, **options):
    load = lambda name: make_model(int(name))
    policy = make_model(0)
    names = {"aligndistil": ("dpo", "reverse"), "aligndistil_theorem1": ("dpo",)}.get(loss, ())
    teachers = {name: make_reference(f"model:{2 + i}", policy, load=load) for i, name in enumerate(names)}
    args = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
        max_steps=4, learning_rate=1e-3, max_grad_norm=0.0, logging_steps=1, save_strategy="no", report_to="none",
        disable_tqdm=True, use_cpu=True, optim="sgd", lr_scheduler_type="constant", seed=3,
        per_device_eval_batch_size=3,
    )  # fmt: skip
    reference = "auto" if loss == "meet" else "model:1"
    rows = rows_for(loss)
    return PreferenceTrainer(
        policy, args, train_dataset=rows, eval_dataset=rows, tokenizer=make_tokenizer(), loss=loss,
        reference=reference, load_reference=load, teachers=teachers, callbacks=[keep] if keep else None, **options,
    )  # fmt: skip


def run(folder, loss, batch, accumulate):
    keep = Keep()
    trainer = make_trainer(folder, loss, batch, accumulate, keep)
    trainer.train()
    evaluation = trainer.evaluate()
    wanted = ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies")
    return {"losses": keep.losses, "gradients": keep.gradients, "eval": {k: evaluation[k] for k in wanted}}


def first_batch(trainer, n=3, fillers=0):
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(n + fillers)])
    batch["filler"][n:] = True  # afterwards: the collator drops them where there is another row
    return batch


@pytest.mark.parametrize(
    "loss", ["kto", "apo_zero_unpaired", "mapl_intra", "meet", "aligndistil", "aligndistil_theorem1"]
)
def test_micro_batches_add_up_to_the_batch(loss, tmp_path, monkeypatch):
    """4 x 1 against 1 x 4, short last window included; KTO with its KL held fixed, which a split changes."""
    monkeypatch.setattr(engines, "estimate_kl", lambda *_: torch.tensor(0.7))
    assert_same(run(tmp_path / "small", loss, 1, 4), run(tmp_path / "whole", loss, 4, 1), 2e-6)


@pytest.mark.parametrize("loss", ["kto", "mapl_intra", "meet", "aligndistil"])
def test_fillers_count_for_nothing(loss, tmp_path):
    trainer = make_trainer(tmp_path, loss)
    plain, filled = first_batch(trainer), first_batch(trainer, fillers=2)
    ours, theirs = (engines.ENGINES[trainer.loss.kind](trainer, trainer.model, b) for b in (filled, plain))
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-6, atol=1e-7)
    assert {u: int(n) for u, n in trainer.count_units(filled).items()} == {
        u: int(n) for u, n in trainer.count_units(plain).items()
    }
    for name, value in theirs.metrics.items():
        torch.testing.assert_close(ours.metrics[name], value, rtol=1e-5, atol=1e-6)
    alone = trainer.data_collator([trainer.train_dataset[-1]])
    nothing = engines.ENGINES[trainer.loss.kind](trainer, trainer.model, alone)
    assert all(total.item() == 0.0 for total in nothing.sums.values())
    nothing.loss.backward()


@pytest.mark.parametrize("loss", ["kto", "mapl_intra", "meet", "aligndistil"])
def test_sums_over_counts_are_the_loss(loss, tmp_path):
    trainer = make_trainer(tmp_path, loss)
    batch = first_batch(trainer, 5)
    out, counts = engines.ENGINES[trainer.loss.kind](trainer, trainer.model, batch), trainer.count_units(batch)
    total = sum(value / counts[unit] for unit, value in out.sums.items())
    torch.testing.assert_close(total, out.loss, rtol=1e-6, atol=0.0)


def test_mismatched_rows_take_the_response_of_the_row_before(tmp_path):
    trainer = make_trainer(tmp_path, "kto")
    batch = first_batch(trainer, 2, fillers=1)
    rows = [trainer.train_dataset[i] for i in range(2)]
    real = torch.tensor([True, True, False, True, True, False])
    found = engines.mismatched_rows(batch, real)
    prompts = [r["prompt_ids"] for r in rows] * 2
    responses = [r["chosen_ids"] for r in rows] + [r["rejected_ids"] for r in rows]
    for b in range(4):
        wanted = prompts[b] + responses[b - 1]
        assert found["input_ids"][b, : len(wanted)].tolist() == wanted
        assert found["attention_mask"][b].sum() == len(wanted)
    one = engines.mismatched_rows(first_batch(trainer, 1), torch.tensor([True, True]))
    assert one["response_lengths"].tolist() == [len(rows[0]["rejected_ids"]), len(rows[0]["chosen_ids"])]


def test_kto_is_called_with_labels_and_the_estimated_kl(tmp_path):
    trainer = make_trainer(tmp_path, "kto", loss_args={"beta": 0.3})
    batch = first_batch(trainer)
    policy, reference = trainer.model, make_model(1)
    with torch.no_grad():
        shifted = engines.mismatched_rows(batch, torch.ones(6, dtype=torch.bool))
        kl = (response_stats(policy, shifted).logps.sum() - response_stats(reference, shifted).logps.sum()) / 6
        ours, theirs = response_stats(policy, batch), response_stats(reference, batch)
        stats = TokenStats(mask=ours.mask, logps=ours.logps, ref_logps=theirs.logps)
        expected = kto_loss(stats, torch.tensor([True] * 3 + [False] * 3), kl, beta=0.3)
    out = engines.unpaired(trainer, policy, batch)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=0.0)
    assert out.metrics["kl/reference_point"].item() == pytest.approx(max(kl.item(), 0.0), rel=1e-4, abs=1e-5)
    rewards = 0.3 * (ours.logps - theirs.logps).sum(-1)
    assert out.metrics["rewards/margins"].item() == pytest.approx((rewards[:3] - rewards[3:]).mean().item(), rel=1e-4)
    assert out.metrics["rewards/accuracies"].item() == pytest.approx((rewards[:3] > rewards[3:]).float().mean().item())


def test_a_policy_that_is_its_reference_has_no_kl_and_loss_a_half(tmp_path):
    trainer = make_trainer(tmp_path, "kto")
    trainer.reference = make_reference("copy", trainer.model)
    out = engines.unpaired(trainer, trainer.model, first_batch(trainer))
    assert out.loss.item() == pytest.approx(0.5, abs=1e-5)


def test_a_loss_without_a_reference_point_makes_no_extra_forward(tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "estimate_kl", lambda *_: pytest.fail("not read"))
    trainer = make_trainer(tmp_path, "apo_zero_unpaired")
    assert math.isfinite(engines.unpaired(trainer, trainer.model, first_batch(trainer)).loss.item())


@pytest.mark.parametrize("loss", ["aligndistil", "aligndistil_theorem1"])
def test_distillation_gets_each_models_own_logits(loss, tmp_path):
    trainer = make_trainer(tmp_path, loss)
    batch = first_batch(trainer)
    function, seeds = {
        "aligndistil": (aligndistil_loss, (0, 2, 3)), "aligndistil_theorem1": (aligndistil_theorem1_loss, (0, 2, 1)),
    }[loss]  # fmt: skip
    mask = torch.arange(int(batch["response_lengths"].max())) < batch["response_lengths"][:, None]
    spans = [(p - 1, p + r - 1) for p, r in zip(batch["prompt_lengths"], batch["response_lengths"], strict=True)]

    def logits(seed):
        with torch.no_grad():
            found = make_model(seed)(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return torch.cat([row[a:b] for row, (a, b) in zip(found, spans, strict=True)])

    expected = function(*(logits(seed) for seed in seeds), mask)
    out = engines.distillation(trainer, trainer.model, batch)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=0.0)
    with torch.no_grad():
        gain = [response_stats(make_model(seed), batch).logps.sum(-1) for seed in (0, 1)]
    margins = (gain[0] - gain[1])[:3] - (gain[0] - gain[1])[3:]
    assert out.metrics["rewards/margins"].item() == pytest.approx(margins.mean().item(), rel=1e-4)
    out.loss.backward()
    assert all(p.grad is not None for p in trainer.model.parameters())


def test_what_is_missing_is_named(tmp_path):
    rows, args = rows_for("dpo"), TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    common = {"train_dataset": rows, "tokenizer": make_tokenizer()}
    with pytest.raises(InputError, match=r"'aligndistil' needs a teacher 'dpo': pass teachers="):
        PreferenceTrainer(make_model(), args, loss="aligndistil", **common)
    with pytest.raises(InputError, match="'mapl_intra' needs one response under two prompts"):
        PreferenceTrainer(make_model(), args, loss="mapl_intra", **common)
