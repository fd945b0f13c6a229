"""RewardTrainer: the loss of each reading, exact over accumulation, and data that do not fit refused."""

import pytest
import torch
from tiny import make_model, make_pairs, make_tokenizer
from transformers import TrainerCallback, TrainingArguments

from tokenpo.data import load_preferences, tokenize_preferences
from tokenpo.data.edits import add_edits
from tokenpo.data.labelled import as_outcomes, load_labelled
from tokenpo.errors import InputError
from tokenpo.reward_models import READINGS, Reading, RewardModel
from tokenpo.training import RewardTrainer, fit_normaliser
from tokenpo.training.reward_trainer import RewardCollator, loss_for

PAIRS = 9


def pairs():
    return tokenize_preferences(load_preferences(make_pairs(PAIRS)), make_tokenizer(), max_length=64)


def step_rows():
    rows = [{"prompt": f"say {c}:", "completions": ["ab ", "cd"], "labels": [True, c < "d"]} for c in "abcdefghi"]
    return load_labelled(rows, make_tokenizer()).rows


ROWS = {
    "last_token": pairs,
    "prefixes": pairs,
    "segments": pairs,
    "token_classes": lambda: add_edits(pairs()),
    "values": lambda: as_outcomes(pairs()),
    "implicit": lambda: as_outcomes(pairs()),
}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    make_model(0).save_pretrained(folder)
    return str(folder)


class Keep(TrainerCallback):
    def __init__(self):
        self.gradients, self.losses = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append(torch.cat([p.grad.flatten() for _, p in sorted(model.named_parameters())]))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])


def run(start, folder, name, rows, batch=4, accumulate=1, steps=2, **settings):
    keep = Keep()
    args = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
        max_steps=steps, learning_rate=1e-2, max_grad_norm=0.0, logging_steps=1, save_strategy="no", report_to="none",
        disable_tqdm=True, use_cpu=True, optim="sgd", lr_scheduler_type="constant", seed=3,
    )  # fmt: skip
    model = RewardModel.from_backbone(start, Reading(name, **settings), make_tokenizer())
    trainer = RewardTrainer(model, args, train_dataset=rows, eval_dataset=rows.select(range(3)), callbacks=[keep])
    trainer.train()
    return trainer, keep


@pytest.mark.parametrize("name", READINGS)
def test_accumulation_changes_nothing(start, tmp_path, name):
    rows = ROWS[name]()
    settings = {"threshold": 2.5} if name == "segments" else {}
    trainer, whole = run(start, tmp_path / "a", name, rows, batch=4, accumulate=1, **settings)
    _, split = run(start, tmp_path / "b", name, rows, batch=1, accumulate=4, **settings)
    assert whole.losses == pytest.approx(split.losses, rel=1e-5)
    for a, b in zip(whole.gradients, split.gradients, strict=True):
        assert (a - b).norm() < 1e-5 * a.norm() and a.norm() > 0
    assert {"eval_loss", "eval_rewards/accuracies"} <= set(trainer.evaluate())
    if trainer.reward_model.reference is not None:
        assert not any(p.requires_grad for p in trainer.reward_model.reference.parameters())


def test_labelled_steps_train_token_classes(start, tmp_path):
    rows = step_rows()
    assert "token_labels" in rows.column_names
    _, keep = run(start, tmp_path, "token_classes", rows, steps=12)
    assert sum(keep.losses[-3:]) < sum(keep.losses[:3])


def test_fillers_count_for_nothing(start, tmp_path):
    rows = as_outcomes(pairs())
    trainer, _ = run(start, tmp_path, "values", rows, steps=1)
    collate = RewardCollator(0)
    plain = collate([rows[0], rows[1]])
    filled = collate([rows[0], rows[1], {**rows[5], "filler": True}])
    assert trainer.count_units(filled) == {"rows": torch.tensor(2)}
    with torch.no_grad():
        a, b = (trainer.batch_loss(trainer.model, batch) for batch in (plain, filled))
    torch.testing.assert_close(a.loss, b.loss)


def test_a_lora_head_trains_and_merges_to_the_same_scores(start, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = RewardModel.from_backbone(start, Reading("values"), make_tokenizer())
    network = get_peft_model(model.network, LoraConfig(task_type="SEQ_CLS", r=2, target_modules="all-linear"))
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, learning_rate=1e-2, report_to="none", use_cpu=True, save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    rows = as_outcomes(pairs())
    before = model.network.score.weight.detach().clone() if hasattr(model.network.score, "weight") else None
    trainer = RewardTrainer(model, args, train_dataset=rows, network=network)
    trainer.train()
    batch = RewardCollator(0)([rows[0], rows[1]])
    model.network = network
    adapted = model.eval().scores(batch)
    model.network = network.merge_and_unload()
    torch.testing.assert_close(model.eval().scores(batch), adapted, rtol=1e-4, atol=1e-5)
    assert before is None or not torch.equal(model.network.score.weight, before)
    model.save_pretrained(tmp_path / "merged")
    assert torch.equal(RewardModel.from_pretrained(tmp_path / "merged").scores(batch), model.scores(batch))


def test_the_normaliser_is_fitted_on_segment_ends(start):
    model = RewardModel.from_backbone(start, Reading("segments", threshold=2.5), make_tokenizer()).eval()
    fitted = fit_normaliser(model, pairs(), batch_size=4)
    assert fitted.reading.normaliser is not None and model.reading.normaliser is None
    again = fit_normaliser(model, pairs(), batch_size=9)
    assert fitted.reading.normaliser == pytest.approx(again.reading.normaliser, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "row", "sentence"),
    [
        ("values", {"chosen_ids": [1]}, "reading 'values' trains on rows with 'outcome', these have chosen_ids"),
        ("segments", {"outcome": 1}, "reading 'segments' trains on rows with 'chosen_ids', these have outcome"),
        ("token_classes", {"chosen_ids": [1]}, "reading 'token_classes' trains on rows with 'chosen_operations' or"),
    ],
)
def test_data_that_do_not_fit_the_reading_are_refused(name, row, sentence):
    with pytest.raises(InputError) as error:
        loss_for(name, row)
    assert str(error.value).startswith(sentence)
