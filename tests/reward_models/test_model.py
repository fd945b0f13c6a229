"""One model class, six readings: what each says of tokens, layout on disk, the same bits in a new process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from score_once import batch, numbers
from tiny import make_model, make_tokenizer

from tokenpo.credit import red_rewards
from tokenpo.errors import InputError
from tokenpo.evaluation import as_batch
from tokenpo.reward_models import READINGS, LocationNormaliser, Outputs, Reading, RewardModel

HERE = Path(__file__).parent
CAUSAL = ("last_token", "prefixes", "token_classes", "values", "implicit")


def fresh(folder, name, **settings):
    """A model with a head far from zero; of `implicit`, one that has moved from its reference."""
    model = RewardModel.from_backbone(str(folder), Reading(name, **settings), make_tokenizer()).eval()
    with torch.no_grad():
        for index, parameter in enumerate(model.network.parameters()):
            torch.manual_seed(index)
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def models(model_folder):
    settings = {"segments": {"threshold": 1.0, "normaliser": LocationNormaliser(0.1, 0.0, 0.3, 2.0)}}
    return {name: fresh(model_folder, name, **settings.get(name, {})) for name in READINGS}


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    root = tmp_path_factory.mktemp("saved")
    for name, model in models.items():
        model.save_pretrained(root / name)
    return root


def test_a_new_process_scores_bit_for_bit_the_same(models, folders, tmp_path):
    out = tmp_path / "numbers.pt"
    paths = [str(folders / name) for name in models]
    done = subprocess.run(
        [sys.executable, str(HERE / "score_once.py"), str(out), *paths], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for (name, model), theirs in zip(models.items(), torch.load(out, weights_only=True), strict=True):
        for key, ours in numbers(model).items():
            assert torch.equal(ours, theirs[key]), f"{key} of {name}"
            assert ours.abs().max() > 0, f"{key} of {name}"


def test_what_is_saved(folders):
    for name in READINGS:
        config = json.loads((folders / name / "config.json").read_text())
        assert config["token_reward"]["name"] == name
        assert {"model.safetensors", "tokenizer.json"} <= {p.name for p in (folders / name).iterdir()}
        assert (folders / name / "reference").is_dir() == (name in ("segments", "implicit"))
    config = json.loads((folders / "segments" / "config.json").read_text())
    assert config["token_reward"]["normaliser"] == {"w_mean": 0.1, "w_std": 0.0, "b_mean": 0.3, "b_std": 2.0}


def test_scalar_heads_load_as_the_familys_sequence_classifier(models, folders):
    from transformers import AutoModelForSequenceClassification

    theirs, found = AutoModelForSequenceClassification.from_pretrained(folders / "prefixes", output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    rows = batch()
    with torch.no_grad():
        logits = theirs.eval()(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits
    assert torch.equal(logits[:, 0], models["prefixes"].scores(rows))


def test_heads_with_classes_load_as_the_familys_token_classifier(models, folders):
    from transformers import AutoModelForTokenClassification

    folder = folders / "token_classes"
    theirs, found = AutoModelForTokenClassification.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert theirs.config.id2label == {0: "bad", 1: "good"}
    rows = batch()
    with torch.no_grad():
        logits = theirs.eval()(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits
    at = int(rows["prompt_lengths"][0])
    expected = 2 * logits[0, at].softmax(-1)[1] - 1
    torch.testing.assert_close(models["token_classes"].token_values(rows)[0, 0], expected)


def test_any_sequence_classifier_with_one_label_is_a_reward_model(tmp_path):
    from transformers import LlamaForSequenceClassification

    config = make_model().config
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model = RewardModel.from_pretrained(tmp_path)
    assert model.reading == Reading("last_token") and model.scores(batch()).abs().max() > 0


def test_other_folders_are_refused(model_folder, tmp_path):
    with pytest.raises(InputError, match="is no reward model"):
        RewardModel.from_pretrained(model_folder)
    with pytest.raises(InputError, match="cannot load a reward model"):
        RewardModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", CAUSAL)
def test_values_depend_on_the_prefix_alone_and_padding_changes_nothing(models, name):
    prompt, response = [1, 5, 6], [7, 8, 9, 10, 2]
    alone = models[name].token_values(as_batch([prompt], [response]))
    padded = models[name].token_values(as_batch([prompt, prompt], [response, [*response, 11, 12, 13]]))
    torch.testing.assert_close(padded[0, :5], alone[0])
    torch.testing.assert_close(padded[1, :5], alone[0])
    assert padded[0, 5:].tolist() == [0.0, 0.0, 0.0]


def test_prefix_values_are_the_scores_of_prefixes(models):
    prompt, response = [1, 5, 6], [7, 8, 9]
    for name in ("last_token", "prefixes", "values"):
        values = models[name].prefix_values(as_batch([prompt], [response]))[0]
        scores = [models[name].scores(as_batch([prompt], [response[:n]])).item() for n in (1, 2, 3)]
        assert values[1:].tolist() == pytest.approx(scores, abs=1e-6)
    with pytest.raises(InputError, match="read as 'segments' gives prefixes no value"):
        models["segments"].prefix_values(as_batch([prompt], [response]))


def test_rewards_of_each_reading_sum_as_they_say(models):
    rows = batch()
    total = {name: model.token_rewards(rows).sum(-1) for name, model in models.items()}
    scores = {name: model.scores(rows) for name, model in models.items()}
    torch.testing.assert_close(total["last_token"], scores["last_token"])
    torch.testing.assert_close(total["implicit"], scores["implicit"])
    for name in ("prefixes", "values"):
        start = models[name].prefix_values(rows)[:, 0]
        torch.testing.assert_close(total[name], scores[name] - start, atol=1e-5, rtol=1e-5)
    mask = models["prefixes"](rows).mask
    torch.testing.assert_close(
        models["prefixes"].token_values(rows), red_rewards(models["prefixes"].prefix_values(rows), mask)
    )


def test_severities_are_worth_what_mqm_says():
    reading = Reading("token_classes", classes=("correct", "minor", "major", "critical"))
    logits = torch.zeros(1, 3, 4)
    logits[0, 2, 3] = 100.0
    outputs = Outputs(torch.tensor([[True, True]]), logits=logits)
    assert reading.token_values(outputs)[0].tolist() == pytest.approx([-4.0, -10.0])
    assert reading.scores(outputs).tolist() == pytest.approx([-7.0])


def test_settings_survive_their_dictionary():
    reading = Reading("segments", threshold=1.5, normaliser=LocationNormaliser(1.0, 2.0, 3.0, 4.0))
    assert Reading.from_dict(json.loads(json.dumps(reading.as_dict()))) == reading


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"name": "prefix"}, "unknown reading 'prefix': did you mean 'prefixes'?"),
        ({"name": "segments", "treshold": 1}, "a reading has no setting 'treshold': did you mean 'threshold'?"),
        ({"name": "segments", "threshold": -1}, "of a reading, threshold is at least 0"),
        ({"name": "values", "classes": ["correct", "incorrect"]}, "'values' has the class 'correct' at place 1"),
        ({"name": "token_classes", "classes": ["bad", "ugly"]}, "classes of tokens are bad, good"),
    ],
)
def test_settings_that_cannot_be_are_named(settings, sentence):
    with pytest.raises(InputError) as error:
        Reading.from_dict(settings)
    assert str(error.value).startswith(sentence) or sentence in str(error.value)


def test_families_without_a_classifier_of_their_own_get_one():
    from transformers import AutoModelForSequenceClassification, CodeGenConfig

    from tokenpo.reward_models.network import head_class

    sizes = {"vocab_size": 32, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 4, "rotary_dim": 2}
    config = CodeGenConfig(**sizes, bos_token_id=1, eos_token_id=2, num_labels=1)
    assert type(config) not in AutoModelForSequenceClassification._model_mapping
    network = head_class(config)(config).eval()
    ids = torch.arange(6)[None]
    assert network(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.shape == (1, 6, 1)


def test_an_encoder_is_refused():
    from transformers import T5Config

    from tokenpo.reward_models.network import head_class

    with pytest.raises(InputError, match="a t5 model is not a causal language model"):
        head_class(T5Config())
