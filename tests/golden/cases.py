"""Reading golden vectors: one safetensors file a case, every output of it compared or the test fails."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

OWN_COPY = Path(__file__).parent / "vectors"


def root() -> Path:
    """The folder of vectors: `TOKENPO_GOLDEN`, or the repository's own copy."""
    folder = Path(os.environ.get("TOKENPO_GOLDEN", OWN_COPY))
    if not folder.is_dir():
        raise FileNotFoundError(f"TOKENPO_GOLDEN names no folder: {folder}")
    return folder


def slugs() -> list[str]:
    return sorted(p.name for p in root().iterdir() if p.is_dir() and any(p.glob("*.safetensors")))


def files(slug: str) -> list[Path]:
    return sorted((root() / slug).glob("*.safetensors"))


@dataclass
class Case:
    """One file: `tensors`, `config`, `notes`; `compared` collects the outputs an adapter has held us to."""

    path: Path
    tensors: dict[str, Tensor]
    config: dict
    notes: str
    compared: set[str] = field(default_factory=set)

    @classmethod
    def read(cls, path: Path) -> Case:
        with safe_open(path, framework="pt") as f:
            metadata = f.metadata()
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 - not a dict
        return cls(path, tensors, json.loads(metadata["config"]), metadata.get("notes", ""))

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def leaf(self, name: str) -> Tensor:
        """An input that gradients are taken of."""
        return self.tensors[name].clone().requires_grad_()

    @property
    def mask(self) -> Tensor:
        return self.tensors["mask"].bool()

    def check(self, name: str, ours: Tensor | None, rtol: float = 1e-9, atol: float = 1e-12) -> None:
        """Hold our value to the file's."""
        expected = self.tensors[name]
        assert ours is not None, f"{name}: no value"
        torch.testing.assert_close(
            ours.detach().to(expected.dtype), expected, rtol=rtol, atol=atol, msg=lambda m: f"{name}: {m}"
        )
        self.compared.add(name)

    def uncompared(self) -> list[str]:
        outputs = {name for name in self.tensors if name.startswith(("out_", "grad_"))}
        return sorted(outputs - self.compared)
