"""What every layer is that chooses between experts: ours, and DeepSpeed's as a baseline."""

from __future__ import annotations

from abc import ABC, abstractmethod

from jaxtyping import Float, Int, Integer
from torch import Tensor, nn

from simvq_moe.core.ids import as_ids


class Mixture(nn.Module, ABC):
    """A layer that chooses between experts.

    Its forward takes tokens and, for routers that go by them, their vocabulary ids, and with
    `with_routing=True` gives a pair: outputs, and the `Routing` of the tokens, flattened.
    """

    width: int
    num_experts: int
    top_k: int

    def flattened(
        self, x: Float[Tensor, "*batch width"], token_ids: Integer[Tensor, "*batch"] | None
    ) -> tuple[Float[Tensor, "tokens width"], Int[Tensor, " tokens"] | None]:
        """Tokens and their ids, one a row.

        Raises:
            ValueError: tokens are of another width, or ids of another shape or no integers.
        """
        if x.shape[-1] != self.width:
            raise ValueError(
                f"tokens {tuple(x.shape)} have {x.shape[-1]} channels on their last axis, but the "
                f"layer's width is {self.width}"
            )
        if token_ids is None:
            return x.reshape(-1, self.width), None
        if token_ids.shape != x.shape[:-1]:
            raise ValueError(
                f"token_ids {tuple(token_ids.shape)} for tokens {tuple(x.shape)}: give one a token"
            )
        return x.reshape(-1, self.width), as_ids(token_ids, "token_ids").reshape(-1)

    @abstractmethod
    def rows_of_products(self) -> Float[Tensor, "experts width"] | None:
        """The rows whose products with the input are the logits, up to biases; None: there are no
        such rows."""

    @abstractmethod
    def expert_outputs(
        self, x: Float[Tensor, "tokens width"]
    ) -> Float[Tensor, "experts tokens width"]:
        """E_i(x) of every expert for every token, before a shared map at the outputs; ranks that
        share experts must call it together."""

    @abstractmethod
    def reset(self, std: float, ending_std: float) -> None:
        """Start again from N(0, std), the last projections of experts from N(0, ending_std)."""
