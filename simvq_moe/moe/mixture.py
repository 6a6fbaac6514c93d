"""What every layer is that chooses between experts: ours, and DeepSpeed's as a baseline."""

from __future__ import annotations

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor, nn


class Mixture(nn.Module, ABC):
    """A layer that chooses between experts.

    Its forward takes tokens and, for routers that go by them, their vocabulary ids, and with
    `with_routing=True` gives a pair: outputs, and the `Routing` of the tokens, flattened.
    """

    width: int
    num_experts: int
    top_k: int

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
