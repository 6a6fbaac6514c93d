"""Usage: one set of measures, from counts, for codes and experts alike.

Counts are int64 and are summed over ranks and windows before any ratio is formed; averages are
never averaged. `usage(counts)` gives the measures, `null_usage` what perfectly uniform random
choices would score with as many draws, and `UsageCounter` is the buffer that a layer counts in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Int, Integer
from torch import Tensor, nn

from simvq_moe.core.state import Stateful

NULL_SAMPLES = 32

Kind = Literal["codes", "experts", "kept"]
"""What slots are: codes, experts as they were chosen, experts after a capacity."""


@dataclass(frozen=True)
class Usage:
    """How evenly slots (codes or experts) are used; f is a slot's share of all draws, N slots."""

    used: float
    """Share of slots drawn at least once in the window."""
    dead: float
    """Share of slots never drawn in the window."""
    starved: float
    """Share of slots drawn less than a tenth of the fair share 1/N."""
    perplexity: float
    """exp(H(f)): the number of equally used slots with the same entropy; N is even."""
    relative_perplexity: float
    """perplexity / N."""
    entropy: float
    """H(f) / ln N; 1 is even, 0 is one slot only."""
    max_load: float
    """N max f (load, Switch Transformer, arXiv:2101.03961); 1 is even, N is one slot only."""
    max_vio: float
    """max n / mean n - 1 (arXiv:2408.15664, eq. 4); 0 is even."""
    min_vio: float
    """1 - min n / mean n; 0 is even, 1 if any slot is dead."""
    cv: float
    """Standard deviation over mean, ddof 0 (arXiv:1701.06538); 0 is even."""
    gini: float
    """sum_ij |f_i - f_j| / (2 N); 0 is even, 1 - 1/N is one slot only."""

    def as_dict(self) -> dict[str, float]:
        return dict(vars(self))


def usage(counts: Int[Tensor, " slots"] | np.ndarray) -> Usage:
    """Measures of one layer's counts; invariant to the order of the slots.

    Args:
        counts: draws of each slot over a window, already summed over ranks.

    Raises:
        ValueError: no slot, or no draw: a window without draws has no usage.
    """
    n = counts.detach().cpu().numpy() if isinstance(counts, Tensor) else np.asarray(counts)
    if n.ndim != 1 or len(n) == 0 or n.dtype == np.bool_ or n.min() < 0:
        raise ValueError(f"usage: counts {n!r} must be one axis of draws >= 0, at least one > 0")
    if n.sum() == 0:
        raise ValueError(
            f"usage: nothing was drawn yet, all {len(n):,} counts are 0 and at least one > 0 is "
            "needed: call the layer in training mode, or in evaluation inside `with "
            "counting(model)`, and read its counts before that ends"
        )
    slots, n = len(n), np.sort(n.astype(np.float64))
    f, mean = n / n.sum(), n.mean()
    positive = f[f > 0]
    entropy = float((positive * -np.log(positive)).sum())
    rank = np.arange(1, slots + 1)
    return Usage(
        used=float((n > 0).mean()),
        dead=float((n == 0).mean()),
        starved=float((n < 0.1 * mean).mean()),
        perplexity=float(np.exp(entropy)),
        relative_perplexity=float(np.exp(entropy) / slots),
        entropy=float(entropy / np.log(slots)) if slots > 1 else 1.0,
        max_load=float(slots * f[-1]),
        max_vio=float(n[-1] * slots / n.sum() - 1),
        min_vio=float(1 - n[0] / mean),
        cv=float(n.std() / mean),
        # the double sum over pairs, from sorted shares in O(N log N)
        gini=float(((2 * rank - slots - 1) * f).sum() / slots),
    )


def null_usage(slots: int, draws: int, seed: int = 0) -> Usage:
    """Mean measures of `draws` independent uniform draws: the score of perfectly even chance.

    An estimate from `NULL_SAMPLES` multinomial samples with a fixed seed. Experts are drawn
    without replacement within a token, which is slightly more even than this.
    """
    rng, even = np.random.default_rng(seed), np.full(slots, 1 / slots)
    measured = [usage(rng.multinomial(draws, even)).as_dict() for _ in range(NULL_SAMPLES)]
    return Usage(**{k: float(np.mean([m[k] for m in measured])) for k in measured[0]})


class UsageCounter(Stateful):
    """Counts draws of each slot in an int64 tensor, outside autograd and optimizer state.

    Counts in training, and in evaluation only inside `counting`; activations recomputed in the
    backward pass are not counted again. A token makes `top_k` draws. The counts are this process's
    alone and lie on the device, outside the state dict: the training loop reads, sums over ranks
    and clears them.
    """

    counts: Tensor

    def __init__(self, slots: int, kind: Kind, top_k: int = 1) -> None:
        super().__init__()
        self.slots = slots
        self.top_k = top_k
        self.kind: Kind = kind
        self.counting_in_eval = False
        self.hold("counts", partial(torch.zeros, slots, dtype=torch.int64))

    @torch.no_grad()
    def add(self, ids: Integer[Tensor, "*draws"]) -> None:
        """Count ids, each a draw of one slot; negative ones are none."""
        if (self.training or self.counting_in_eval) and not recomputing():
            ids = ids.reshape(-1).to(torch.int64)
            # bincount would wait for a GPU, and its shape breaks torch.compile's graph
            self.counts.scatter_add_(0, ids.clamp_min(0), once((ids >= 0).to(torch.int64)))

    @torch.no_grad()
    def take(self) -> Int[Tensor, " slots"]:
        """The counts since the last take; starts a new window."""
        taken = self.counts.clone()
        self.counts.zero_()
        return taken


def recomputing() -> bool:
    """True inside a backward pass, where activation checkpointing runs a forward again.

    Not while a graph is compiled, which then runs in both: see `once` and `first_run`.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def once(x: Tensor) -> Tensor:
    """x for a sum; in a compiled graph 0 where activation checkpointing runs it again."""
    return x * first_run(x) if torch.compiler.is_compiling() else x


# an operator of its own, so that a compiled graph asks when it runs
@torch.library.custom_op("simvq_moe::first_run", mutates_args=(), schema="(Tensor like) -> Tensor")
def first_run(like: Tensor) -> Bool[Tensor, ""]:
    """Whether this is no run again, as a tensor where `like` is."""
    return torch.full((), not recomputing(), device=like.device)


@first_run.register_fake
def _(like: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.bool, device=like.device)


def counters(model: nn.Module) -> list[UsageCounter]:
    """Every usage counter of a model, in module order: layer 0 first."""
    return [m for m in model.modules() if isinstance(m, UsageCounter)]


@contextmanager
def counting(model: nn.Module) -> Iterator[list[UsageCounter]]:
    """Count in evaluation, in a window of its own, to be read inside; the training window is put
    back after it."""
    found = counters(model)
    kept = [counter.take() for counter in found]
    for counter in found:
        counter.counting_in_eval = True
    try:
        yield found
    finally:
        for counter, counts in zip(found, kept, strict=True):
            counter.counting_in_eval = False
            counter.counts.copy_(counts)
