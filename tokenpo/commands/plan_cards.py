"""Cards that `tokenpo plan` knows by name: memory, dense bfloat16 rate, bandwidth, as their makers state them."""

from __future__ import annotations

import re
from typing import NamedTuple

from tokenpo.errors import InputError
from tokenpo.methods import nearest


class Card(NamedTuple):
    """`gigabytes` of 2^30 bytes, `tflops` of dense bfloat16 products with float32 sums, `bandwidth` in 10^9 bytes/s."""

    gigabytes: float
    tflops: float
    bandwidth: float


# NVIDIA's data sheets and architecture white papers; rates without sparsity, at boost clocks. The GA102 and AD102
# papers give the tensor rate with float32 sums, which on GeForce cards is half of that with float16 sums. T4 and V100
# have no bfloat16: their float16 rate stands here.
CARDS = {
    "t4": Card(16, 65, 320),  # T4 data sheet
    "v100-16": Card(16, 125, 900),  # V100 data sheet, SXM2
    "v100-32": Card(32, 125, 900),
    "rtx 3060": Card(12, 25.5, 360),  # GA106, scaled from the GA102 paper by cores and clock
    "rtx 3090": Card(24, 71, 936),  # GA102 white paper, table 2
    "rtx 4070": Card(12, 58.3, 504),  # AD104, Ada white paper, appendix
    "rtx 4080": Card(16, 97.5, 717),  # AD103, Ada white paper, appendix
    "rtx 4090": Card(24, 165.2, 1008),  # Ada white paper, appendix A
    "rtx 5090": Card(32, 209.5, 1792),  # Blackwell RTX white paper
    "a10": Card(24, 125, 600),  # A10 data sheet
    "l4": Card(24, 121, 300),  # L4 data sheet: 242 with sparsity
    "a40": Card(48, 149.7, 696),  # A40 data sheet
    "rtx a6000": Card(48, 154.8, 768),  # RTX A6000 data sheet: 309.7 with sparsity
    "l40s": Card(48, 362, 864),  # L40S data sheet: 733 with sparsity
    "a100-40": Card(40, 312, 1555),  # A100 data sheet
    "a100-80": Card(80, 312, 2039),  # A100 data sheet, SXM4
    "h100": Card(80, 989, 3350),  # H100 data sheet, SXM5: 1979 with sparsity
    "h100-pcie": Card(80, 756, 2000),  # H100 data sheet, PCIe: 1513 with sparsity
    "h200": Card(141, 989, 4800),  # H200 data sheet
    "b200": Card(180, 2250, 8000),  # DGX B200 data sheet, an eighth of the system
}
TYPICAL = {12: "rtx 4070", 16: "rtx 4080", 24: "rtx 4090", 32: "rtx 5090", 40: "a100-40", 48: "l40s", 80: "a100-80"}
"""The card whose rate stands for a size alone: the smallest of these that has as much memory, else h200."""


def card_of(gpu: str) -> tuple[str, Card]:
    """("rtx 4090", its figures) from a name, or from a size such as 24GB, whose rates are those of a typical card.

    Raises InputError for a size that is none, and a name that is not known.
    """
    text = " ".join(re.sub(r"nvidia|geforce|gb$", " ", gpu.lower().replace("_", " ")).split())
    plain = _plain(text)
    for name, card in CARDS.items():
        if _plain(name) in (plain, "rtx" + plain):
            return name, card
    several = [name for name in CARDS if name.startswith(text + "-")]
    if several:
        raise InputError(f"gpu '{gpu}' comes in several sizes: say {' or '.join(several)}")
    found = re.fullmatch(r"([+-]?\d+(?:\.\d+)?)\s*(gib|gb|g|mib|mb|m)?", gpu.strip().lower())
    if found is None:
        raise InputError(f"gpu '{gpu}' is neither a size such as 24GB nor a known card{nearest(text, CARDS)}")
    size = float(found[1]) / (1024 if (found[2] or "g").startswith("m") else 1)
    if not size > 0:
        raise InputError(f"gpu must be a positive size, got '{gpu}'")
    name = next((card for least, card in TYPICAL.items() if size <= least), "h200")
    return f"{size:g} GB, as fast as {name}", CARDS[name]._replace(gigabytes=size)


def _plain(name: str) -> str:
    return re.sub(r"[\s-]", "", name)
