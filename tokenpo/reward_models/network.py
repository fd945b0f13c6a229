"""A head on every token of any Hugging Face causal model, in the layout of that family's own classifiers.

The weights are called as in `<Family>ForSequenceClassification` for a scalar head (backbone, then `score.weight`) and
`<Family>ForTokenClassification` for a head with classes (`score.bias` too), so a folder written here loads with
`AutoModelForSequenceClassification` or `AutoModelForTokenClassification` where the family has one, and in engines that
know those layouts.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from torch import nn

from tokenpo.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


class TokenHead:
    """A backbone and `score`, a linear map of every hidden state; mixed into a family's base by `head_class`."""

    base_model_prefix: str

    def __init__(self, config: Any) -> None:
        from transformers import AutoModel

        super().__init__(config)  # type: ignore[call-arg]
        model: Any = self
        model.num_labels = config.num_labels
        setattr(self, self.base_model_prefix, AutoModel.from_config(config))
        # Bradley-Terry cannot see a bias; classes have prior odds.
        width = config.get_text_config().hidden_size
        model.score = nn.Linear(width, config.num_labels, bias=config.num_labels > 1)
        model.post_init()

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        """`.logits` (B, L, k): the head after every token."""
        from transformers.modeling_outputs import TokenClassifierOutput

        given = {name: value for name, value in kwargs.items() if value is not None}
        given.pop("use_cache", None)
        body, score = getattr(self, self.base_model_prefix), self.score  # type: ignore[attr-defined]
        found = body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **given)
        return TokenClassifierOutput(logits=score(found.last_hidden_state))


@functools.cache
def _head_class(body: type, ending: str) -> type:
    from transformers import PreTrainedModel

    family = next(c for c in body.__mro__ if PreTrainedModel in c.__bases__)
    name = family.__name__.removesuffix("PreTrainedModel") + ending
    return type(name, (TokenHead, family), {"__module__": __name__})


def head_class(config: Any) -> Any:
    """The model class for a configuration; InputError for a model that is no causal language model."""
    from transformers import AutoModel, AutoModelForCausalLM

    known = type(config) in AutoModelForCausalLM._model_mapping and type(config) in AutoModel._model_mapping
    if not known or getattr(config, "is_encoder_decoder", False):
        raise InputError(f"a {config.model_type} model is not a causal language model: a token head needs one")
    body = AutoModel._model_mapping[type(config)]
    ending = "ForSequenceClassification" if config.num_labels == 1 else "ForTokenClassification"
    return _head_class(body[0] if isinstance(body, tuple) else body, ending)


def head_logits(network: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """(B, T + 1, k) of a batch laid out as in `response_stats`: after the prompt, then after each response token."""
    import torch

    logits = network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    steps = torch.arange(int(batch["response_lengths"].max()) + 1, device=logits.device)
    columns = (batch["prompt_lengths"].unsqueeze(-1) - 1 + steps).clamp(max=logits.shape[1] - 1)
    return logits.gather(1, columns.unsqueeze(-1).expand(-1, -1, logits.shape[-1]))
