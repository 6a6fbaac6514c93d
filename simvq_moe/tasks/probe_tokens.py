"""The tokens that the probe routes at every evaluation, and what is known of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from simvq_moe.data.codes import CodeSequences
from simvq_moe.data.text.tokens import TokenWindows

LARGEST_DOMAINS = 15
"""Domains that are told apart, by their probe tokens; all others are one more."""
OTHERS = "(others)"


@dataclass(frozen=True)
class ProbeTokens:
    """The probe's windows and what is known of their input tokens."""

    windows: Int[Tensor, "batch window"]
    domains: Int[Tensor, " tokens"]
    """Numbers of `names`."""
    names: tuple[str, ...]
    """Names of domains, that with the most tokens first."""

    @property
    def inputs(self) -> Int[Tensor, " tokens"]:
        return self.windows[:, :-1].flatten()


def choose_tokens(held_out: TokenWindows | CodeSequences, tokens: int) -> ProbeTokens:
    """Windows of about so many tokens, evenly spread, so that they come from many documents."""
    number = min(len(held_out), max(1, tokens // held_out.context))
    indices = np.linspace(0, len(held_out) - 1, number).round().astype(np.int64)
    windows, domains = held_out.batch(indices), held_out.domains_of(indices)
    if held_out.domains is None or domains is None:
        return ProbeTokens(windows, torch.zeros(number * held_out.context).long(), ("",))
    counts = np.bincount(domains.flatten(), minlength=len(held_out.domains.names))
    present = [int(i) for i in np.argsort(-counts, kind="stable") if counts[i]]
    names = [held_out.domains.names[i] for i in present[:LARGEST_DOMAINS]]
    place = np.full(len(counts), LARGEST_DOMAINS)
    place[present[:LARGEST_DOMAINS]] = np.arange(len(names))
    if len(present) > LARGEST_DOMAINS:
        names.append(OTHERS)
    return ProbeTokens(windows, torch.from_numpy(place[domains.flatten()]), tuple(names))
