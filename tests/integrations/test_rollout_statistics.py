"""What estimators read of the vocabulary, made in blocks, against whole logits."""

import pytest
import torch
from tiny import make_model

from tokenpo.advantages import disagreement, prediction_errors
from tokenpo.integrations import rollouts
from tokenpo.statistics import LinearHead, PromptSharing

LENGTHS = torch.tensor([[3, 4], [3, 6], [2, 1], [5, 6]])
GROUP = torch.tensor([4, 4, 1, 1])


@pytest.fixture
def batch():
    ids = torch.randint(4, 30, (4, 11), generator=torch.Generator().manual_seed(0))
    attended = torch.arange(11) < LENGTHS.sum(1, keepdim=True)
    return {"input_ids": ids * attended, "attention_mask": attended.long(), "prompt_lengths": LENGTHS[:, 0],
            "response_lengths": LENGTHS[:, 1]}  # fmt: skip


def dense(model, batch):
    """(logits, tokens, mask), each (4, 6, ...) of the response tokens."""
    with torch.no_grad():
        found = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    places = (LENGTHS[:, :1] + torch.arange(6)).clamp(max=10)
    logits = found.gather(1, (places - 1).unsqueeze(-1).expand(-1, -1, found.shape[-1]))
    return logits, batch["input_ids"].gather(1, places), torch.arange(6) < LENGTHS[:, 1:]


def found(model, batch, *names):
    return rollouts.statistics(
        model, batch, names, 6, chunk=3, temperature=0.7, sharing=PromptSharing(False), reference=None
    )


@pytest.mark.parametrize("at_a_time", [1, 100, 2**22])
def test_errors_of_the_likeliest_tokens(batch, at_a_time, monkeypatch):
    monkeypatch.setattr(rollouts, "LOGITS", at_a_time)
    monkeypatch.setattr(rollouts, "ERRORS", 5)
    model = make_model(0)
    logits, tokens, mask = dense(model, batch)
    errors, ids = prediction_errors(logits / 0.7, tokens, kept=5)
    ours = found(model, batch, "errors", "error_ids", "hidden")
    assert torch.equal(ours["error_ids"][mask], ids[mask]) and not ours["errors"][~mask].any()
    torch.testing.assert_close(ours["errors"][mask], errors[mask])
    torch.testing.assert_close(LinearHead.of(model).logits(ours["hidden"])[mask], logits[mask])


@pytest.mark.parametrize("at_a_time", [1, 150, 2**22])
def test_disagreement_position_by_position(batch, at_a_time, monkeypatch):
    monkeypatch.setattr(rollouts, "LOGITS", at_a_time)
    model = make_model(0)
    logits, _, mask = dense(model, batch)
    expected = disagreement(logits / 0.7, GROUP, mask)
    hidden = found(model, batch, "hidden")["hidden"]
    ours = rollouts.disagreements(hidden, GROUP, mask, LinearHead.of(model), 0.7)
    torch.testing.assert_close(ours[mask], expected[mask], rtol=1e-4, atol=1e-5)
    assert ours[mask].min() >= 0 and ours.max() > 1
