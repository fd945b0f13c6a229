"""Golden vectors of diagnostics: loss by token frequency, detection by place in a span."""

from __future__ import annotations

from collections.abc import Callable

import torch
from cases import Case
from torch import Tensor

from tokenpo.evaluation import in_span_index, span_position_auroc, token_losses


def check_where_defined(case: Case, name: str, ours: Tensor) -> None:
    """NaN at the same places, and equal elsewhere."""
    expected = case[name]
    assert torch.equal(ours.isnan(), expected.isnan()), f"{name}: NaN at other places"
    case.tensors[name] = expected[~expected.isnan()]
    case.check(name, ours[~ours.isnan()])


def diag_freq_loss(case: Case) -> None:
    assert case.config["bin_rule"] == "lo <= count < hi"
    counts = case["token_counts"]
    found = token_losses(case["logps"], case["tokens"], case.mask, vocabulary=len(counts))
    micro, macro = found.by_frequency(counts, case.config["bin_edges"])
    ours = {
        "out_type_loss": found.by_type,
        "out_type_n": found.counts,
        "out_micro_loss": found.micro(),
        "out_macro_loss": found.macro(),
        "out_bin_micro": micro,
        "out_bin_macro": macro,
    }
    for name, value in ours.items():
        check_where_defined(case, name, value)


def diag_span_auroc(case: Case) -> None:
    index, mask = case["in_span_index"], case.mask
    assert torch.equal(torch.where(mask, index, -1) >= 0, case["hall_mask"].bool() & mask)
    assert torch.equal(in_span_index(index >= 0), index)
    found = span_position_auroc(case["scores"], index, mask, length=len(case["out_auroc_by_index"]))
    check_where_defined(case, "out_auroc_by_index", found.by_index)
    case.check("out_count_by_index", found.counts)
    case.check("out_auroc_first", found.first)
    case.check("out_auroc_conditional", found.conditional)
    case.check("out_auroc_all", found.all)
    case.check("out_auroc_first_vs_conditional", found.first_vs_conditional)


ADAPTERS: dict[str, Callable[[Case], None]] = {"diag_freq_loss": diag_freq_loss, "diag_span_auroc": diag_span_auroc}
