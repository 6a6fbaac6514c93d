"""Bytes that a forward pass keeps for the backward pass, on one rank.

For language models by a formula, tensor by tensor in the order of the model's code (the way of
Korthikanti et al., arXiv:2205.05198, section 4, whose GPT differs from this model). Small tensors
are left out, and what routers other than `topk` keep beside. Models of other tasks are counted on
samples.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from simvq_moe.config.schema import Config
from simvq_moe.core.search.nearest import flops_of_search
from simvq_moe.core.state import held_tensors
from simvq_moe.engine.devices import this_device
from simvq_moe.errors import ConfigError
from simvq_moe.models.blocks import Block, DenseBlock, MoEBlock
from simvq_moe.models.cross_entropy import LARGEST
from simvq_moe.models.language_model import LanguageModel
from simvq_moe.moe import MoE
from simvq_moe.moe.experts import FeedForward
from simvq_moe.tasks.registry import task_of

FLOAT32, INT64 = 4, 8


def activation_bytes(model: LanguageModel, tokens: int, size: int) -> int:
    """Bytes kept for a micro-batch.

    Args:
        tokens: of the micro-batch.
        size: bytes of a number in the precision of forward and backward.
    """
    blocks = block_bytes(model, size)
    width = model.embedding.embedding_dim
    # indices; the last norm; targets
    rest = INT64 + _of_norm(width, size) + INT64
    head = head_bytes(model, tokens)
    if model.activation_checkpointing:
        # the input of every block, and all of the one that runs again
        return tokens * (len(blocks) * width * size + max(blocks) + rest) + head
    return tokens * (sum(blocks) + rest) + head


def block_bytes(model: LanguageModel, size: int) -> list[int]:
    """Bytes of a token that each block keeps."""
    return [_of_block(block, size) for block in model.blocks if isinstance(block, Block)]


def head_bytes(model: LanguageModel, tokens: int) -> int:
    """Bytes that the head keeps: log-probabilities in float32, or where they would be too many,
    both gradients of a head that makes them in pieces."""
    vocabulary, width = model.embedding.num_embeddings, model.embedding.embedding_dim
    whole = FLOAT32 * tokens * vocabulary
    if whole <= LARGEST[this_device().type]:
        return whole
    return FLOAT32 * (tokens + vocabulary) * width


def score_bytes(model: LanguageModel, tokens: int) -> int:
    """Bytes of scores, and of their gradients, beside what the head keeps of them."""
    whole = FLOAT32 * tokens * model.embedding.num_embeddings
    return 2 * min(whole, LARGEST[this_device().type])


def kept_bytes(model: nn.Module, batch: Tensor) -> tuple[int, Tensor]:
    """Bytes of all storages that autograd keeps in `model(batch)` but the model's own, and its
    loss."""
    tensors = (*model.parameters(), *model.buffers(), *held_tensors(model))
    own = {t.untyped_storage().data_ptr() for t in tensors}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = model(batch)
    return sum(size for place, size in found.items() if place not in own), loss


class SampleCost(NamedTuple):
    """Costs of a batch: of itself, whatever its size, and of each sample."""

    flops: tuple[float, float]
    saved: tuple[float, float]
    """Bytes in float32."""
    tokens: int
    """Tokens of a sample."""

    def flops_per_token(self, samples: int) -> float:
        """Operations a token in a batch of so many samples."""
        return (self.flops[0] / samples + self.flops[1]) / self.tokens

    def kept_bytes(self, samples: int, size: int) -> int:
        """Bytes that a batch of so many samples saves, with so many bytes a number."""
        return round((self.saved[0] + self.saved[1] * samples) * size / FLOAT32)


def sample_cost(model: nn.Module, config: Config) -> SampleCost:
    """Counted on one sample and on two, forward and backward, on copies of the model.

    What is computed once in a batch, such as the rows under a shared map, comes out as the cost of
    the batch itself.

    Raises:
        ConfigError: the task has no such sample.
    """
    task, flops, saved = task_of(config), [], []
    sample = task.counted_sample(config)
    if sample is None:
        raise ConfigError(
            f"task {config.task!r} has no sample to count costs on: its class needs "
            "`counted_sample`"
        )
    with torch.random.fork_rng(devices=[]):
        one = torch.rand(sample.shape).to(next(model.parameters()).device) * 2 - 1
    for samples in (1, 2):
        copied = copy.deepcopy(model).eval()  # anew, because an evaluated codebook keeps its rows
        with counting() as counter:
            size, loss = kept_bytes(copied, one.expand(samples, *one.shape).contiguous())
            loss.backward()
        flops.append(float(counter.get_total_flops()))
        saved.append(float(size))
    return SampleCost(_line(*flops), _line(*saved), task.tokens_of_a_sample(config))


def counting() -> FlopCounterMode:
    """Counts the operations of matrix products and convolutions, and of the search for codes, which
    is an operator of its own."""
    rules = {torch.ops.simvq_moe.nearest: flops_of_search}
    return FlopCounterMode(display=False, custom_mapping=rules)


def _line(one: float, two: float) -> tuple[float, float]:
    return 2 * one - two, two - one


def _of_block(block: Block, size: int) -> int:
    """Bytes of a token."""
    width, heads = block.attention.out.in_features, block.attention.heads
    # q, k and v, of which v stays a view of all three; turned q and k; the result of the heads, of
    # which the next product reads a view; logarithms of their sums
    attention = 6 * width * size + FLOAT32 * heads
    branches = attention + 2 * _of_norm(width, size)
    if block.attention.q_norm is not None:
        # of q and k: normalized and the scale of each head, in float32, and in another precision
        # the input as well, which otherwise is a view of all three
        branches += 2 * FLOAT32 * ((1 if size == FLOAT32 else 2) * width + heads)
    if isinstance(block, DenseBlock):
        return branches + _of_network(block.dense, size)
    assert isinstance(block, MoEBlock)
    if not isinstance(block.moe, MoE):  # DeepSpeed's own: about the rows that it pads
        return branches + block.moe.top_k * 2 * width * size
    return branches + _of_mixture(block.moe, size)


def _of_norm(width: int, size: int) -> int:
    """Input and normalized input in float32, its scale, and what the next product reads; a fused
    kernel of a GPU keeps one of the first two."""
    return FLOAT32 * (2 * width + 1) + width * size


def _of_mixture(moe: MoE, size: int) -> int:
    width, choices = moe.width, moe.top_k
    # of a choice: sorted row, inside of the expert, output; gate; id, place and order
    kept = choices * (2 * width + moe.experts.expert.kept_numbers * moe.experts.hidden) * size
    kept += choices * (FLOAT32 + 3 * INT64)
    # logits, their softmax and its logarithm, for the choice and the losses of balance
    kept += FLOAT32 * (2 * moe.num_experts + 1)
    if size != FLOAT32:
        kept += FLOAT32 * width + size * choices  # the router's input, and gates in its precision
    for bank in moe.experts.banks:
        if bank.shared and bank.maps:
            kept += width * size
    if moe.shared_experts is not None:
        # and their input, of which the router has a copy of its own
        kept += _of_network(moe.shared_experts, size) + width * size
    return kept


def _of_network(network: FeedForward, size: int) -> int:
    return network.expert.kept_numbers * network.down.in_features * size
