"""Blocks of a transformer: attention, then one network for every token or a mixture of experts.

Both branches are residual and read their input through RMSNorm (arXiv:1910.07467).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from simvq_moe.config.moe import MoEConfig
from simvq_moe.core.bank import Bank
from simvq_moe.core.streams import own_stream
from simvq_moe.core.whitening import Whitening
from simvq_moe.models.attention import Attention
from simvq_moe.models.document_attention import Documents
from simvq_moe.moe.experts import Experts
from simvq_moe.moe.layer import MoE, build_dense, build_mixture
from simvq_moe.moe.routers.base import Routing


class Block(nn.Module, ABC):
    """Attention on a normalized residual branch; a subclass adds the feed-forward branch."""

    def __init__(
        self,
        width: int,
        heads: int,
        context: int,
        moe: MoEConfig,
        vocabulary: int,
        *,
        qk_norm: bool,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width)
        self.attention = Attention(width, heads, context, qk_norm=qk_norm)
        self.add_feed_forward(width, moe, vocabulary)

    @abstractmethod
    def add_feed_forward(self, width: int, moe: MoEConfig, vocabulary: int) -> None:
        """Make the modules of the second branch."""

    def forward(
        self,
        x: Float[Tensor, "batch tokens width"],
        token_ids: Int[Tensor, "batch tokens"],
        documents: Documents | None = None,
    ) -> tuple[Float[Tensor, "batch tokens width"], Routing | None]:
        """Outputs, and how a mixture routed the tokens.

        Args:
            documents: those that attention is kept inside of; None: all is one.
        """
        x = x + compiled_in_training(self.attention, self.attention_norm(x), documents)
        y, routing = self.feed_forward(x, token_ids)
        return x + y, routing

    @abstractmethod
    def feed_forward(
        self, x: Float[Tensor, "batch tokens width"], token_ids: Int[Tensor, "batch tokens"]
    ) -> tuple[Float[Tensor, "batch tokens width"], Routing | None]:
        """The second branch."""

    def reset(self, std: float, ending_std: float) -> None:
        """Start again from N(0, std), what ends a branch from N(0, ending_std)."""
        self.attention.qkv.weight.normal_(std=std)
        self.attention.out.weight.normal_(std=ending_std)

    def merge_norms_(self) -> None:
        """See `LanguageModel.merge_norms_`."""
        merge_gain(self.attention_norm, self.attention.qkv.weight)

    @property
    @abstractmethod
    def is_one_graph(self) -> bool:
        """Whether torch.compile can trace all of it, with no size that depends on the data."""


class MoEBlock(Block):
    """A block whose second branch is a mixture of experts."""

    def add_feed_forward(self, width: int, moe: MoEConfig, vocabulary: int) -> None:
        self.moe_norm = nn.RMSNorm(width)
        self.moe = build_mixture(width, moe, vocabulary)

    def feed_forward(
        self, x: Float[Tensor, "batch tokens width"], token_ids: Int[Tensor, "batch tokens"]
    ) -> tuple[Float[Tensor, "batch tokens width"], Routing]:
        return self.moe(self.moe_norm(x), token_ids, with_routing=True)

    def reset(self, std: float, ending_std: float) -> None:
        super().reset(std, ending_std)
        with own_stream():
            self.moe.reset(std, ending_std)

    def merge_norms_(self) -> None:
        moe = self.moe
        if not isinstance(moe, MoE):
            raise ValueError(f"{type(moe).__name__} has no banks that a gain can be merged into")
        readers = moe.router.linear_readers()
        if isinstance(moe.router.centre, Whitening):
            raise ValueError(
                "a router still whitens its input: fold it first, then merge the norms"
            )
        if moe.router.centre is not None:
            raise ValueError(
                f"{type(moe.router).__name__} takes a mean off its input, which no gain can be "
                "merged into"
            )
        readers.append(moe.experts.up)
        if any(isinstance(reader, Bank) and reader.maps for reader in readers):
            raise ValueError("a bank still has its map: fold the maps first, then merge the norms")
        readers += [] if moe.shared_experts is None else [moe.shared_experts.up.weight]
        weights = [one.base if isinstance(one, Bank) else one for one in readers]
        super().merge_norms_()
        merge_gain(self.moe_norm, *weights)

    @property
    def is_one_graph(self) -> bool:
        # other products of groups loop over them, and ranks exchange as many rows as were chosen
        if not isinstance(self.moe, MoE) or type(self.moe.experts) is not Experts:
            return False
        experts = self.moe.experts
        aligned = all(n % 8 == 0 for n in (experts.width, experts.hidden, experts.key_rank))
        return aligned and self.attention.qkv.weight.dtype == torch.bfloat16


class DenseBlock(Block):
    """A block whose second branch is one network for every token."""

    def add_feed_forward(self, width: int, moe: MoEConfig, vocabulary: int) -> None:
        del vocabulary
        self.dense_norm = nn.RMSNorm(width)
        self.dense = build_dense(width, moe)

    def feed_forward(
        self, x: Float[Tensor, "batch tokens width"], token_ids: Int[Tensor, "batch tokens"]
    ) -> tuple[Float[Tensor, "batch tokens width"], None]:
        del token_ids
        return self.dense(self.dense_norm(x)), None

    def reset(self, std: float, ending_std: float) -> None:
        super().reset(std, ending_std)
        with own_stream():
            self.dense.reset(std, ending_std)

    def merge_norms_(self) -> None:
        super().merge_norms_()
        merge_gain(self.dense_norm, self.dense.up.weight)

    @property
    def is_one_graph(self) -> bool:
        return True


def compiled_in_training(module: nn.Module, *inputs: Tensor | Documents | None) -> Any:
    """module(*inputs), in training by its compiled code where there is some: elsewhere shapes vary,
    and each would be compiled anew."""
    if module.training or module._compiled_call_impl is None:
        return module(*inputs)
    return module.forward(*inputs)


def merge_gain(norm: nn.RMSNorm, *readers: Float[Tensor, "... width"]) -> None:
    """(x * gain) R^T = x (R * gain)^T: move the gain into the rows of all that read the norm."""
    for reader in readers:
        reader.mul_(norm.weight)
    norm.weight.fill_(1.0)
