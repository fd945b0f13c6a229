"""Where the memory of a run goes and what its steps take: a function a part, from sizes alone; bytes, FLOPs, seconds.

Activations have no formula here: `tokenpo.training.dry_run` counts them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenpo.errors import InputError
from tokenpo.statistics.dense import REFERENCE_OUTPUTS
from tokenpo.statistics.tiles import BLOCK_ROWS
from tokenpo.training.dry_run import Sweeps
from tokenpo.training.tally import Segment

PARTS = (
    "weights", "quantisation state", "adapters", "gradients", "optimiser", "reference", "teachers", "critic",
    "hidden states", "activations", "layer in work", "statistics", "KV cache", "engine", "context",
)  # fmt: skip
"""Every part of a peak, in the order in which it is shown."""


def distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Tied tensors once."""
    return list({id(t): t for t in tensors}.values())


def size(tensors: Iterable[Tensor]) -> int:
    """Sum of elements x bytes an element, tied tensors once."""
    return sum(t.numel() * t.dtype.itemsize for t in distinct(tensors))


def weight_bytes(model: nn.Module, four_bit: Sequence[int] = ()) -> dict[str, int]:
    """Weights, adapters and what quantisation keeps beside 4-bit layers of `four_bit` weights each.

    Weights: the sum over parameters and buffers, two to a byte in 4-bit layers, whose bytes are counted as they are.
    Adapters: the parameters that PEFT added, known by "lora_" or "modules_to_save" in their names.
    """
    added = [p for name, p in model.named_parameters() if "lora_" in name or ".modules_to_save." in name]
    known = {id(p) for p in added}
    rest = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in known]
    state = sum(four_bit_state_bytes(n) for n in four_bit)
    return {"weights": size(rest), "quantisation state": state, "adapters": size(added)}


def four_bit_state_bytes(weights: int, block: int = 64, nested: int = 256) -> int:
    """What stands beside n weights in four bits with double quantisation (QLoRA, arXiv 2305.14314, section 3).

    ceil(n / 64) scales of a byte each, a float32 scale of their own for every 256 of them, a float32 mean, and
    bitsandbytes' table of 16 float32 values: 0.127 bits a weight.
    """
    scales = -(-weights // block)
    return scales + 4 * -(-scales // nested) + 4 + 16 * 4


def gradient_bytes(model: nn.Module) -> int:
    """A gradient in the dtype of its parameter for everything that trains."""
    return size(p for p in model.parameters() if p.requires_grad)


ADAM_32 = ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused")
BITSANDBYTES = {
    "adamw_8bit": (8, 2), "adamw_bnb_8bit": (8, 2), "paged_adamw_8bit": (8, 2), "paged_adamw_32bit": (32, 2),
    "paged_adamw": (32, 2), "lion_8bit": (8, 1), "paged_lion_8bit": (8, 1), "lion_32bit": (32, 1),
    "paged_lion_32bit": (32, 1),
}  # fmt: skip
"""Bits and number of states of a parameter."""


def optimiser_bytes(name: str, model: nn.Module) -> int:
    """State of an optimiser of transformers by its name, for everything in `model` that trains.

    torch's AdamW: two tensors like the parameter, in its dtype, and a float32 step; its RMSprop: one; SGD: none.
    bitsandbytes: `states` tensors of one byte an element and a float32 scale for every 256 of them; four bytes for
    parameters of fewer than 4096 elements and, as transformers asks, for embeddings. Paged ones can leave the card
    when it is full, at the price of time; they are counted all the same.
    """
    trained = distinct(p for p in model.parameters() if p.requires_grad)
    if name in ADAM_32:
        return sum(2 * p.numel() * p.dtype.itemsize + 4 for p in trained)
    if name in ("sgd", "rmsprop"):
        return sum(p.numel() * p.dtype.itemsize + 4 for p in trained) if name == "rmsprop" else 0
    if name not in BITSANDBYTES:
        known = ", ".join((*ADAM_32[:2], "sgd", "rmsprop", *BITSANDBYTES))
        raise InputError(f"the optimiser '{name}' cannot be planned: one of {known} can")
    bits, states = BITSANDBYTES[name]
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    total = 0
    for p in trained:
        whole = bits == 32 or p.numel() < 4096 or id(p) in embeddings
        total += states * (4 * p.numel() if whole else p.numel() + 4 * -(-p.numel() // 256))
    return total


@dataclass(frozen=True)
class Sweep:
    """What the statistics over a vocabulary are called with.

    `tokens` N, `hidden` d, `vocabulary` V; `operand` bytes of the product's dtype.
    `outputs` of `linear_token_stats`; `reference`: its hidden states come too; `one_head`: it has the policy's own
    head; `trained`: the head trains; `tile_bytes` the budget; `expected`: `tokenpo.statistics.expected` can serve.
    """

    tokens: int
    hidden: int
    vocabulary: int
    operand: int
    outputs: tuple[str, ...]
    reference: bool
    one_head: bool
    trained: bool
    tile_bytes: int
    softcap: bool = False
    expected: bool = False

    @property
    def reads(self) -> bool:
        return self.reference and any(name in REFERENCE_OUTPUTS for name in self.outputs)

    @property
    def kls(self) -> bool:
        return self.reference and ("ref_kl" in self.outputs or "policy_kl" in self.outputs)

    @property
    def serves(self) -> bool:
        """Are gradients made in the forward sweep?"""
        prevented = self.trained or self.softcap or "policy_kl" in self.outputs or "log_p2" in self.outputs
        return self.expected and not prevented


def tile_entries(sweep: Sweep) -> int:
    """Rows x columns of a tile, by the formula of `linear_token_stats`: min(N, 2048) rows, and the columns that the
    budget pays for at the bytes of all buffers together, a multiple of 64 unless one tile is the whole vocabulary."""
    buffers = 2 + 2 * sweep.reads + sweep.softcap
    each = buffers * 4 + (sweep.operand if sweep.operand < 4 else 0)
    rows = max(1, min(sweep.tokens, BLOCK_ROWS))
    width = max(1, min(sweep.tile_bytes // (rows * each), sweep.vocabulary))
    return rows * (width - width % 64 if 64 < width < sweep.vocabulary else width)


def sweep_bytes(sweep: Sweep) -> Sweeps:
    """What `linear_token_stats` takes: its buffers (`statistics/fold.py`, `statistics/gradient.py`), entry by entry.

    Forwards a product of each model, widened to float32 if it is narrower, exponentials where a sum needs logits too,
    those of the reference where a KL does. Backwards the same products, the reference's only under a KL. One head for
    two models: their states stacked. N > 2048 rows of a head that trains: a tile's part of its gradient. With
    expectations in place of a second sweep: sums (N, d), and again as results, which stay until the backward pass; the
    first tile has two more copies of its rows. Running sums of 17 float32 numbers a token, of which 7 stay.
    """
    entries, n_d = tile_entries(sweep), sweep.tokens * sweep.hidden
    narrow = 4 if sweep.operand < 4 else 0
    models = 1 + sweep.reads
    forward = models * (sweep.operand + narrow)
    forward += 4 * (sweep.reads or "entropy" in sweep.outputs) + 4 * sweep.kls
    stacked = 2 * n_d * sweep.operand if sweep.one_head and sweep.reads else 0
    kept = 28 * sweep.tokens
    forward_rows, backward_rows = 68 * sweep.tokens, 16 * sweep.tokens
    if sweep.serves:
        sums = 4 * n_d * (1 + (sweep.kls and "ref_kl" in sweep.outputs))
        twice = max(sums, 8 * min(sweep.tokens, BLOCK_ROWS) * sweep.hidden)
        backward = n_d * (sweep.operand + 4)
        return Sweeps(entries * forward + stacked + sums + twice + forward_rows, backward + backward_rows, sums + kept)
    back = (1 + sweep.kls) * (sweep.operand + narrow) + 4 * sweep.softcap
    back += 4 * ("policy_kl" in sweep.outputs or "entropy" in sweep.outputs)
    part = 0
    if sweep.trained and sweep.tokens > BLOCK_ROWS:
        part = entries // BLOCK_ROWS * sweep.hidden * (4 + sweep.operand)
    stacked_back = stacked if sweep.kls else 0
    return Sweeps(
        entries * forward + stacked + forward_rows, entries * back + stacked_back + part + backward_rows, kept
    )


def kv_cache_bytes(config: Any, rows: int, tokens: int, itemsize: int) -> int:
    """Keys and values of `rows` sequences of `tokens`: 2 x layers x heads x head_dim x tokens x bytes each.

    Layers with a sliding window keep no more than it. The cache grows by concatenation: half of one layer's stands
    twice for a moment.
    """
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    heads, width = attention_shape(config)
    window = getattr(config, "sliding_window", None) or tokens
    of = [2 * rows * heads * width * (min(tokens, window) if "sliding" in kind else tokens) for kind in kinds]
    return itemsize * (sum(of) + max(of) // 2)


def attention_shape(config: Any) -> tuple[int, int]:
    """Heads of keys and values, and the width of one."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return getattr(config, "num_key_value_heads", None) or heads, width


@dataclass(frozen=True)
class Peak:
    """The moment of a step at which most is held: `parts`, bytes, and `where` it is."""

    parts: Mapping[str, int]
    where: str

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def highest(standing: Mapping[str, int], phases: Mapping[str, Sequence[Segment]]) -> Peak:
    """The peak over all phases of a step: what stands throughout, what was kept up to a segment, and its rise."""
    best: Peak | None = None
    for phase, segments in phases.items():
        held = dict(standing)
        for segment in segments:
            parts = dict(held)
            parts[segment.part] = parts.get(segment.part, 0) + segment.rise
            peak = Peak({n: parts[n] for n in PARTS if parts.get(n)}, f"{phase}: {segment.name}")
            best = peak if best is None or peak.total > best.total else best
            for name, grown in segment.kept.items():
                held[name] = held.get(name, 0) + grown
    assert best is not None
    return best


# Time.


def matrix_sizes(modules: nn.Module, four_bit: Sequence[int] = ()) -> tuple[int, int, int]:
    """Elements of the matrices that every token is multiplied with: (frozen, trained, of adapters)."""
    frozen, trained, adapters = sum(four_bit), 0, 0
    for name, p in modules.named_parameters():
        if p.dim() < 2 or p.dtype == torch.uint8:
            continue
        if "lora_" in name:
            adapters += p.numel()
        elif p.requires_grad:
            trained += p.numel()
        else:
            frozen += p.numel()
    return frozen, trained, adapters


def body_flops(
    matrices: tuple[int, int, int], tokens: int, attended: float, width: int, *, checkpointing: bool, scored: int
) -> float:
    """Multiplications and additions of the layers in one micro-batch.

    Forwards 2 a token and matrix element, and 4 x width a pair of positions that see each other (scores and values;
    `width` is layers x heads x head_dim). Backwards the same once for the inputs, and once more for the matrices that
    train; attention twice. With checkpointing forwards once more; `scored` further forwards of references.
    """
    frozen, trained, adapters = matrices
    forward = 2 * tokens * (frozen + trained + adapters) + 4 * width * attended
    backward = 2 * tokens * (frozen + 2 * trained + 2 * adapters) + 8 * width * attended
    return forward * (1 + checkpointing + scored) + backward


def head_flops(sweep: Sweep) -> float:
    """2 N V d a product: one for each model's logits, then either one for each expectation, or backwards one for each
    that is built again, one for the hidden states and one for a head that trains."""
    products = 1 + sweep.reads
    products += 1 + sweep.kls if sweep.serves else 1 + sweep.kls + 1 + sweep.trained
    return 2.0 * sweep.tokens * sweep.vocabulary * sweep.hidden * products
