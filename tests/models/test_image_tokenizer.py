"""The image tokenizer: encode, decode and reconstruct agree."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from simvq_moe import VQ, SimVQ
from simvq_moe.models.image_tokenizer import ImageTokenizer


@pytest.mark.parametrize("downsamplings", [0, 1, 2, 3])
def test_decoding_the_ids_of_images_gives_their_reconstruction(downsamplings: int) -> None:
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(SimVQ(32, 8), hidden=8, downsamplings=downsamplings).eval()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    ids = tokenizer.encode(images)
    side = 16 // 2**downsamplings
    assert ids.shape == (2, side, side)
    reconstruction, quantized = tokenizer.reconstruct(images)
    assert reconstruction.shape == images.shape
    assert_close(quantized.ids, ids)
    assert_close(tokenizer.decode(ids), reconstruction, rtol=0, atol=0)


def test_the_loss_is_the_pixel_error_plus_the_quantizers() -> None:
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(VQ(32, 8, commitment_weight=0.5), hidden=8)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    loss, terms = tokenizer(images)
    reconstruction, _ = tokenizer.reconstruct(images)
    assert_close(terms["mse"], F.mse_loss(reconstruction, images))
    expected = terms["mse"] + terms["codebook_loss"] + 0.5 * terms["commitment_loss"]
    assert_close(loss, expected)
