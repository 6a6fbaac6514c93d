"""What tokenizers of all modalities are: an encoder, a quantizer of its latents, and a decoder."""

from __future__ import annotations

from abc import ABC, abstractmethod

from jaxtyping import Float, Int, Integer
from torch import Tensor

from simvq_moe.hub import Pretrained
from simvq_moe.quantizers import AnyQuantizer, Quantized


class Tokenizer(Pretrained, ABC):
    """Samples to ids of codes and back; a modality gives `latents`, `samples` and the loss."""

    quantizer: AnyQuantizer

    @abstractmethod
    def latents(self, x: Float[Tensor, "batch axis *axes"]) -> Float[Tensor, "batch *tokens width"]:
        """What the quantizer is given of samples."""

    @abstractmethod
    def samples(self, z: Float[Tensor, "batch *tokens width"]) -> Float[Tensor, "batch axis *axes"]:
        """Samples of latents, float32 at least."""

    def reconstruct(
        self, x: Float[Tensor, "batch axis *axes"]
    ) -> tuple[Float[Tensor, "batch covered *sides"], Quantized]:
        """Samples through the codebook and back, and what the quantizer returned."""
        quantized = self.quantizer(self.latents(x))
        return self.samples(quantized.z_q), quantized

    def initialize(self, x: Float[Tensor, "batch axis *axes"]) -> None:
        """Start the quantizer from these samples, if its start needs data; see its own method."""
        if self.quantizer.waits_for_data:
            self.quantizer.initialize(self.latents(x))

    def encode(self, x: Float[Tensor, "batch axis *axes"]) -> Int[Tensor, "batch token *levels"]:
        """The ids of the codes of each sample."""
        return self.quantizer.encode(self.latents(x))

    def decode(
        self, ids: Integer[Tensor, "batch token *levels"]
    ) -> Float[Tensor, "batch axis *axes"]:
        """Samples of ids, of whole tokens."""
        return self.samples(self.quantizer.decode(ids))
