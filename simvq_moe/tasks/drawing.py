"""How `generate` draws new tokens, and from which run: what it hands to the run's task."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from simvq_moe.config.schema import Config
from simvq_moe.errors import ConfigError
from simvq_moe.files.tensors import StoredWeights

LEAST_TEMPERATURE = 1e-4
"""Below it scores over the temperature leave the range of float32."""


@dataclass(frozen=True)
class Drawing:
    """How new tokens are drawn: flags of `generate`.

    Raises:
        ConfigError: the temperature is too low.
    """

    temperature: float | None
    """None: that of the task."""
    top_k: int
    seed: int

    def __post_init__(self) -> None:
        given = self.temperature
        if given and given < LEAST_TEMPERATURE:
            raise ConfigError(
                f"--temperature {given} < {LEAST_TEMPERATURE}: use 0 for the best token"
            )

    def options(self, temperature: float) -> dict[str, Any]:
        """Arguments of `LanguageModel.generate`, with a generator at the start of its numbers.

        Args:
            temperature: of the task.
        """
        own = temperature if self.temperature is None else self.temperature
        generator = torch.Generator().manual_seed(self.seed)
        return {"temperature": own, "top_k": self.top_k, "generator": generator}


@dataclass(frozen=True)
class DrawnFrom:
    """A finished run, or its folded model, as `load_run` has found it."""

    folder: Path
    config: Config
    weights: StoredWeights
