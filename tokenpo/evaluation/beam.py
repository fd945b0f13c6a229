"""Search by the soft Q-function of a DPO policy: beams of tokens, scored by `tokenpo.credit.extension_scores`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tokenpo import masked
from tokenpo.credit import extension_scores, implicit_rewards
from tokenpo.errors import InputError
from tokenpo.evaluation.sampling import as_batch, render_prompt
from tokenpo.statistics import LinearHead, hidden_before_head, response_stats


@dataclass(frozen=True)
class Found:
    """A response of a search: its tokens, the end-of-sequence token kept, and its score."""

    token_ids: list[int]
    score: float


@torch.no_grad()
def beam_search(model: Any, tokenizer: Any, prompt: Any, *, beam: int, max_new_tokens: int, beta: float = 0.1) -> Found:
    """The response to one prompt with the highest score found, of at most `max_new_tokens` tokens.

    The score of a prefix is beta * sum_t log pi(y_t), which for a DPO policy trained with this beta is the return so
    far plus the soft value of where it stands, up to the value of the prompt (`tokenpo.credit.search_scores`;
    section 4.3 of arXiv 2404.12358): no reference is read. No length is divided out, so wide beams prefer short
    responses; the paper finds 5 beams better than 1, and more worse. `prompt` as in `render_prompt`. One beam is
    greedy decoding. The greedy response is a candidate of every search, since a wider beam may lose its prefix: a
    wider beam never scores lower than one.
    """
    if beam < 1 or max_new_tokens < 1:
        raise InputError(f"beam and max_new_tokens must be at least 1, got {beam} and {max_new_tokens}")
    ids, eos = render_prompt(prompt, tokenizer), tokenizer.eos_token_id
    found = [_search(model, ids, eos, width, max_new_tokens, beta) for width in sorted({1, beam})]
    return max(found, key=lambda f: f.score)


def _search(model: Any, prompt: list[int], eos: int | None, width: int, limit: int, beta: float) -> Found:
    """Of all extensions keep the `width` best, of those that end the best; stop when none that is open can win."""
    device = next(model.parameters()).device
    out = model(input_ids=torch.tensor([prompt], device=device), use_cache=True)
    scores = torch.zeros(1, dtype=torch.float64, device=device)
    prefixes: list[list[int]] = [[]]
    done: list[Found] = []
    while True:
        extended = extension_scores(scores, out.logits[:, -1].double(), beta=beta)
        best, flat = extended.flatten().topk(min(width, extended.numel()))
        parents, tokens = flat // extended.shape[1], flat % extended.shape[1]
        grown = [
            Found([*prefixes[parent], token], score)
            for parent, token, score in zip(parents.tolist(), tokens.tolist(), best.tolist(), strict=True)
        ]
        last = len(grown[0].token_ids) == limit
        done += [f for f in grown if last or f.token_ids[-1] == eos]
        going_on = [i for i, f in enumerate(grown) if f.token_ids[-1] != eos]
        ahead = max(done, key=lambda f: f.score, default=None)
        # A score only falls as a response grows.
        if ahead and (last or not going_on or ahead.score >= grown[going_on[0]].score):
            return ahead
        prefixes, scores = [grown[i].token_ids for i in going_on], best[going_on]
        out.past_key_values.reorder_cache(parents[going_on])
        out = model(input_ids=tokens[going_on, None], past_key_values=out.past_key_values, use_cache=True)


@torch.no_grad()
def sequence_rewards(
    model: Any, reference: Any, tokenizer: Any, prompts: Sequence[Any], response_ids: Sequence[list[int]], *,
    beta: float = 0.1,
) -> list[float]:  # fmt: skip
    """The implicit reward of each response, beta * sum_t (logps - ref_logps), of the policy `model`."""
    device = next(model.parameters()).device
    reference.to(device)
    batch = as_batch([render_prompt(p, tokenizer) for p in prompts], response_ids, device)
    stats = response_stats(
        model, batch, ("logps",), reference=lambda b: (hidden_before_head(reference, b), LinearHead.of(reference))
    )
    rewards = implicit_rewards(stats.logps, stats.require("ref_logps"), stats.mask, beta=beta)
    return masked.sum(rewards, stats.mask, -1).tolist()
