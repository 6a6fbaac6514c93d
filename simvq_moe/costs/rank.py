"""What each rank of a run holds, computes and sends, by formula: for any number of ranks.

Memory of states: ZeRO (Rajbhandari et al., arXiv:1910.02054, section 5): mixed precision keeps 12
bytes a parameter for the optimizer, weights and two moments in float32, and so does DeepSpeed where
all is float32, except at stage 0, which updates the weights themselves. Traffic: of a ring, the
least there can be (Thakur, Rabenseifner and Gropp, 2005): a rank sends (n - 1) / n of a tensor to
reduce it in parts or to gather it, twice that to do both. Beside that DeepSpeed 0.19 copies every
gradient into its buckets and from there to the optimizer, as its code is read here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from simvq_moe.config.schema import Config
from simvq_moe.core.step_state import StepState, followers
from simvq_moe.costs.activations import (
    SampleCost,
    activation_bytes,
    block_bytes,
    head_bytes,
    sample_cost,
    score_bytes,
)
from simvq_moe.costs.flops import expert_parameters, flops_per_token, of_experts
from simvq_moe.costs.memory import (
    Shares,
    Work,
    checkpoint_bytes,
    gradients,
    largest_piece,
    peak,
    record_bytes,
    start_bytes,
)
from simvq_moe.engine.optimizer import parameter_groups
from simvq_moe.engine.settings import BUCKET, zero_stage
from simvq_moe.models.language_model import LanguageModel
from simvq_moe.moe import MoE
from simvq_moe.quantizers import Quantizer

ADAM_BYTES = 28
"""Memory traffic of an update in float32: weight, gradient and two moments read, three written."""
MOMENT_BYTES, MASTER_BYTES = 8, 4
"""Bytes of a parameter that a rank owns: Adam's moments, and the weights that ZeRO updates."""
EVALUATED = 0.6
"""Share of what a block keeps for the backward pass that it has at once in an evaluation, as was
counted on dense blocks and on mixtures."""


@dataclass(frozen=True)
class RankCosts:
    """One rank among `ranks` in one optimizer step; bytes unless said otherwise."""

    ranks: int
    tokens: int
    """Tokens that the rank has in a step."""
    flops_per_token: float
    parameter_bytes: int
    """Bytes of the weights of forward and backward, and of what is not learned."""
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    memory_bytes: int
    """The most bytes at once, at the start, in a step or in an evaluation."""
    save_bytes: int
    """Bytes of host memory beside that, of the copy that `train.async_save` writes; on CPUs it is
    the same memory."""
    update_bytes: int
    """Bytes that the optimizer and the engine's copies of gradients and weights read and write."""
    dense_bytes: int
    """Bytes that the rank sends for gradients and weights of what all ranks share, and for the sums
    that its tokens are added up in: counts of assignments, what state follows steps by, and what
    codebooks do."""
    expert_bytes: int
    """Bytes that it sends for those of experts, to the ranks that hold the same ones."""
    exchange_bytes: int
    """Bytes that it sends by all-to-all: tokens on their way to experts and back, and gradients."""
    reductions: int
    """Collective calls of the first two kinds, and small ones: norms of gradients and whether they
    are finite, counts of assignments, and the agreement of ranks to go on."""
    exchanges: int
    """Number of all-to-alls."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Plan:
    """The costs of a config on any number of ranks.

    Args:
        model: the whole model, on any device; a language model's may be "meta".
        config: its config.
    """

    def __init__(self, model: nn.Module, config: Config) -> None:
        self.model, self.config = model, config
        learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.experts = expert_parameters(model)
        self.dense = learned - self.experts
        self.frozen_bytes = sum(b.numel() * b.element_size() for b in model.buffers())
        self.record_bytes = record_bytes(model)
        self.checkpoint_bytes = checkpoint_bytes(model) if config.train.async_save else 0
        self.largest = max((p.numel() for p in model.parameters() if p.requires_grad), default=0)
        self.piece = largest_piece(model)
        self.step_sums = sum(
            len(state.pending) for state in followers(model) if isinstance(state, StepState)
        )
        """Numbers that are added up after a step, in one call."""
        groups = parameter_groups(model, config.optimizer)
        self.groups, self.expert_groups = len(groups), 0
        """Groups of the optimizer, and those that the engine makes beside, of experts of which not
        every rank has all."""
        if config.moe.expert_parallel > 1:
            experts = of_experts(model)
            self.expert_groups = sum(
                any(id(p) in experts for p in group["params"]) for group in groups
            )
        self.size = 4 if config.train.dtype == "fp32" else 2
        self.gradient_size = 2 if config.train.dtype == "fp16" else 4
        self.sample: SampleCost | None = None
        if not isinstance(model, LanguageModel):
            self.sample = sample_cost(model, config)

    def on(self, ranks: int, samples: int) -> RankCosts:
        """A rank's costs.

        Args:
            ranks: number of ranks; a multiple of moe.expert_parallel.
            samples: of an optimizer step on one rank.
        """
        train, parallel = self.config.train, self.config.moe.expert_parallel
        stage, size = zero_stage(self.config, ranks), self.size
        shares = self._shares(ranks)
        local, owned = shares.local, shares.owned
        held = owned if stage else local
        weights = (owned if stage == 3 else local) * size
        whole = local if stage < 2 else owned + min(local, BUCKET)
        optimizer = held * (MOMENT_BYTES + MASTER_BYTES * (stage > 0))
        sent, calls = self._passes(stage, ranks)
        per_sample, flops, saved = self._work(samples // train.accumulation)
        kept = self.frozen_bytes + self.record_bytes
        return RankCosts(
            ranks=ranks,
            tokens=samples * per_sample,
            flops_per_token=flops,
            parameter_bytes=weights + self.frozen_bytes,
            gradient_bytes=whole * self.gradient_size,
            optimizer_bytes=optimizer,
            activation_bytes=saved,
            memory_bytes=max(
                self.start_bytes(ranks),
                peak(
                    weights + optimizer + kept,
                    gradients(
                        stage,
                        shares,
                        ranks,
                        size=size,
                        grain=self.gradient_size,
                        accumulates=train.accumulation > 1,
                    ),
                    self._passes_of(samples // train.accumulation, saved),
                ),
            ),
            save_bytes=self.checkpoint_bytes // ranks,
            update_bytes=self._updated(stage, ranks, local, held),
            dense_bytes=round((sent * self.dense + 2 * self._summed()) * (ranks - 1) / ranks),
            expert_bytes=round(sent * self.experts / parallel * (1 - parallel / ranks)),
            exchange_bytes=self._exchanged(samples * per_sample),
            reductions=calls + self._small_calls(stage),
            exchanges=self._exchanges(),
        )

    def start_bytes(self, ranks: int) -> int:
        """The most bytes that a rank has at once before the engine has its weights."""
        start = start_bytes(zero_stage(self.config, ranks), self._shares(ranks), ranks)
        return start + self.frozen_bytes + self.record_bytes

    def _shares(self, ranks: int) -> Shares:
        local = self.dense + self.experts // self.config.moe.expert_parallel
        owned = self.dense // ranks + self.experts // ranks
        return Shares(local, owned, self.largest, self.piece)

    def _passes(self, stage: int, ranks: int) -> tuple[int, int]:
        """Bytes of each parameter that go round a ring in a step, and the collectives of that.

        Stages 1 and 2 are what DeepSpeed 0.19 does: it reduces whole gradients to every rank, where
        the paper would send each part to its owner alone; 2 and 3 reduce every micro-batch.
        """
        train, apart = self.config.train, self.expert_groups > 0
        # experts of which ranks have others are reduced by themselves
        buckets = -(-self._shares(ranks).local // BUCKET) * (1 + apart)
        often = train.accumulation if stage >= 2 else 1
        if stage == 0:
            return 2 * self.gradient_size, buckets
        if stage < 3:
            sent = 2 * often * self.gradient_size + self.size
            # DeepSpeed gathers nothing from a single rank, though it reduces its gradients
            several = ranks > self.config.moe.expert_parallel
            return sent, buckets * often + self.groups + self.expert_groups * several
        sent = often * (self.gradient_size + 2 * self.size)
        return sent, (buckets + 2 * len(list(self.model.parameters()))) * often

    def _small_calls(self, stage: int) -> int:
        # norms of experts are added up over those that have them and then over all
        norms = self.groups + 2 * self.expert_groups + (self.size != 4) if stage else 0
        counts = (self._mixtures() > 0) * self.config.train.accumulation
        codes = sum(often * q.summing_calls for q, often in self._codebooks())
        return 1 + norms + counts + (self.step_sums > 0) + codes

    def _summed(self) -> int:
        """Bytes of what a step adds up over ranks beside gradients."""
        assignments = sum(len(m.usage) for m in self.model.modules() if isinstance(m, MoE))
        codes = sum(often * q.summed_bytes for q, often in self._codebooks())
        return 8 * (assignments * self.config.train.accumulation + self.step_sums) + codes

    def _codebooks(self) -> list[tuple[Quantizer, int]]:
        """Every codebook, and how often a step adds up what it has seen."""
        found = [module for module in self.model.modules() if isinstance(module, Quantizer)]
        passes = self.config.train.accumulation
        return [(codebook, 1 if codebook.changes_by_steps else passes) for codebook in found]

    def _updated(self, stage: int, ranks: int, local: int, owned: int) -> int:
        """Bytes that pass through memory, for parameters held here and those updated here."""
        train, size, gradient = self.config.train, self.size, self.gradient_size
        copies = train.accumulation if stage >= 2 else 1
        clipped = 8 if train.clip else 0
        # into a bucket, out of it in the order of their owners, and the mean over ranks
        moved = copies * 6 * gradient * local if stage or ranks > 1 else 0
        if stage:  # back, together, to the optimizer's gradient in float32, and its weights back
            moved += (copies * 4 * gradient + 2 * (size + 4)) * owned
        return moved + (4 + clipped + ADAM_BYTES) * owned

    def _work(self, samples: int) -> tuple[int, float, int]:
        """Tokens of a sample, FLOPs of a token and bytes kept, for a micro-batch."""
        if self.sample is None:
            assert isinstance(self.model, LanguageModel)
            tokens = samples * self.config.data.context
            flops = float(flops_per_token(self.model, tokens))
            saved = activation_bytes(self.model, tokens, self.size)
            return self.config.data.context, flops, saved
        flops, saved = self.sample.flops_per_token(samples), self.sample.kept_bytes
        return self.sample.tokens, flops, saved(samples, self.size)

    def _passes_of(self, samples: int, kept: int) -> Work:
        """What a micro-batch of so many samples makes, and an evaluation. Of tokenizers it is what
        they keep, because the space that convolutions need depends on the machine.

        Args:
            kept: bytes that the forward pass keeps, with a block that runs again.
        """
        if self.sample is not None:
            return Work(kept, kept, 0, 0)
        model, context, size = self.model, self.config.data.context, self.size
        assert isinstance(model, LanguageModel)
        tokens = samples * context
        block = max(block_bytes(model, size))
        forward, backward = kept + score_bytes(model, tokens), kept
        if model.activation_checkpointing:
            # the block that runs again comes when the scores are gone
            forward -= tokens * block
            backward -= head_bytes(model, tokens)
        evaluated = self.config.train.eval_batch_size * context
        most = max(round(EVALUATED * block * evaluated), score_bytes(model, evaluated))
        return Work(forward, backward, tokens * block, most)

    def _mixtures(self) -> int:
        return sum(isinstance(module, MoE) for module in self.model.modules())

    def _exchanges(self) -> int:
        """All-to-alls: numbers of rows, rows there and back, and gradients likewise; what runs
        twice asks for numbers and rows again."""
        train = self.config.train
        calls = 8 if train.activation_checkpointing else 5
        apart = self.config.moe.expert_parallel > 1
        return calls * apart * train.accumulation * self._mixtures()

    def _exchanged(self, tokens: int) -> int:
        """Rows there and back, and again for the gradients; what runs twice also sends twice."""
        moe, train = self.config.moe, self.config.train
        leaving = (moe.expert_parallel - 1) / moe.expert_parallel
        ways = 6 if train.activation_checkpointing else 4
        rows = tokens * moe.top_k * self._mixtures()
        return round(ways * rows * leaving * self.config.language_model.width * self.size)
