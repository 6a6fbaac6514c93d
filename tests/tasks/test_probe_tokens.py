"""The tokens of the probe: what is known of them. How they are spread: tests/training."""

from __future__ import annotations

import numpy as np
import torch

from simvq_moe.data.text.domains import Domains
from simvq_moe.data.text.tokens import TokenWindows
from simvq_moe.tasks.probe_tokens import OTHERS, choose_tokens


def test_the_largest_domains_are_told_apart_and_the_others_are_one() -> None:
    # document i has 2 + i tokens of domain i
    tokens = np.concatenate([[1] * (1 + i) + [0] for i in range(20)] + [[1]]).astype(np.uint16)
    names = tuple(f"d{i:02}" for i in range(20))
    windows = TokenWindows(tokens, 1, Domains((*names, "z"), np.arange(21)))
    found = choose_tokens(windows, len(tokens))
    assert found.names == (*(f"d{i:02}" for i in range(19, 4, -1)), OTHERS)
    counts = torch.bincount(found.domains).tolist()
    assert counts == [*(2 + i for i in range(19, 4, -1)), sum(2 + i for i in range(5))]
