"""Matrix products of a token, as what a model costs is counted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from simvq_moe.core.bank import Bank


class Product(NamedTuple):
    """A matrix product, for one token."""

    multiply_adds: float
    learned: bool = True
    """Whether both factors have a gradient."""
    backward: bool = True
    """Whether one has."""

    @property
    def flops(self) -> float:
        """Forward and backward, a multiply-add as two."""
        return 2.0 * self.multiply_adds * (1 + self.backward + (self.backward and self.learned))


def products_of_map(bank: Bank, rows: float, learned: bool = True) -> Iterator[Product]:
    """The map of a bank on so many rows a token; a diagonal one is no matrix product."""
    if bank.transform != "diagonal":
        separate = 1 if bank.shared else len(bank.base)
        yield from (Product(rows * p.numel() / separate, learned) for p in bank.maps)


def number_of_rows(bank: Bank) -> int:
    return bank.base.numel() // bank.base.shape[-1]


def is_learned(weights: Tensor) -> bool:
    return isinstance(weights, nn.Parameter)
