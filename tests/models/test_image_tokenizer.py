"""The image tokenizer: encode, decode and reconstruct agree; its loss is that of its config."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from torchmetrics.functional.image import structural_similarity_index_measure

from simvq_moe import VQ, SimVQ
from simvq_moe.core.step_state import after_step
from simvq_moe.models.image.discriminator import PatchDiscriminator
from simvq_moe.models.image.tokenizer import ImageTokenizer
from simvq_moe.models.image.vqgan import SpatialAttention, Upsample

VQGAN: dict[str, Any] = {"architecture": "vqgan", "hidden": 8}


def pictures(side: int = 16, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, side, side) * 2 - 1


def judged(**options: Any) -> ImageTokenizer:
    """A small VQGAN with a discriminator."""
    torch.manual_seed(0)
    weights = {"l1": 1.0, "adversarial": 0.5}
    settings = {"discriminator": PatchDiscriminator(4, 1, "hinge"), "loss_weights": weights}
    return ImageTokenizer(VQ(32, 8), **(VQGAN | settings | options))


def gradients(model: ImageTokenizer, prefix: str) -> dict[str, Tensor]:
    return {
        name: p.grad.clone()
        for name, p in model.named_parameters()
        if name.startswith(prefix) and p.grad is not None
    }


@pytest.mark.parametrize("architecture", ["small", "vqgan"])
@pytest.mark.parametrize("downsamplings", [0, 1, 2, 3])
def test_decoding_the_ids_of_images_gives_their_reconstruction(
    downsamplings: int, architecture: Any
) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"hidden": 8, "downsamplings": downsamplings}
    tokenizer = ImageTokenizer(SimVQ(32, 8), architecture=architecture, **options).eval()
    images = pictures()
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
    images = pictures()
    loss, terms = tokenizer(images)
    reconstruction, _ = tokenizer.reconstruct(images)
    assert terms.keys() == {"mse", "codebook_loss", "commitment_loss"}
    assert_close(terms["mse"], F.mse_loss(reconstruction, images))
    expected = terms["mse"] + terms["codebook_loss"] + 0.5 * terms["commitment_loss"]
    assert_close(loss, expected)


def test_the_loss_is_the_weighted_sum_of_its_terms() -> None:
    torch.manual_seed(0)
    weights = {"mse": 0.5, "l1": 2.0, "ssim": 3.0}
    tokenizer = ImageTokenizer(VQ(32, 8), loss_weights=weights, **VQGAN)
    images = pictures()
    loss, terms = tokenizer(images)
    reconstruction, quantized = tokenizer.reconstruct(images)
    similarity = structural_similarity_index_measure(reconstruction, images, data_range=2.0)
    assert_close(terms["l1"], F.l1_loss(reconstruction, images))
    assert isinstance(similarity, Tensor)
    assert_close(terms["ssim"], 1 - similarity)
    expected = sum(weight * terms[name] for name, weight in weights.items()) + quantized.loss
    assert_close(loss, expected)


def test_multipliers_are_the_channels_at_each_resolution() -> None:
    shape: dict[str, Any] = {"channel_multipliers": (1, 2, 4), "residual_blocks": 2}
    tokenizer = ImageTokenizer(VQ(32, 8), **VQGAN, **shape, attention=True)
    assert tokenizer.to_latent.in_channels == tokenizer.from_latent.out_channels == 32
    assert sum(isinstance(module, SpatialAttention) for module in tokenizer.modules()) == 2
    assert sum(isinstance(module, Upsample) for module in tokenizer.modules()) == 2
    assert tokenizer.reconstruct(pictures())[0].shape == (2, 3, 16, 16)


def test_attention_is_the_softmax_over_all_places() -> None:
    torch.manual_seed(0)
    layer, x = SpatialAttention(8).double(), torch.randn(2, 8, 3, 5, dtype=torch.float64)
    q, k, v = layer.qkv(layer.norm(x)).flatten(2).chunk(3, dim=1)
    weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / 8**0.5, dim=2)
    mixed = torch.einsum("bij,bcj->bci", weights, v).view(x.shape)
    assert_close(layer(x), x + layer.out(mixed))


def test_the_judged_loss_reaches_every_player_with_its_own_gradient_alone() -> None:
    model, images = judged(), pictures()
    loss, terms = model(images)
    loss.backward()
    own = gradients(model, "")
    assert own.keys() == dict(model.named_parameters()).keys()
    model.zero_grad()
    reconstruction, quantized = model.reconstruct(images)
    assert model.discriminator is not None
    score = -model.discriminator(reconstruction).mean()
    (F.l1_loss(reconstruction, images) + quantized.loss + 0.5 * score).backward()
    for name, gradient in (gradients(model, "encoder") | gradients(model, "decoder")).items():
        assert_close(own[name], gradient)
    model.zero_grad()
    real, fake = model.discriminator(images), model.discriminator(reconstruction.detach())
    verdict = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
    verdict.backward()
    for name, gradient in gradients(model, "discriminator").items():
        assert_close(own[name], gradient)
    assert_close(terms["discriminator_loss"], verdict)
    assert_close(terms["adversarial_loss"], score)


@pytest.mark.parametrize("architecture", ["small", "vqgan"])
def test_the_adaptive_weight_is_the_ratio_of_gradients_at_the_last_layer(architecture: Any) -> None:
    model, images = judged(adaptive=True, architecture=architecture), pictures()
    loss, terms = model(images)
    loss.backward()
    reconstruction, quantized = model.reconstruct(images)
    last = [m for m in model.decoder.modules() if isinstance(m, torch.nn.modules.conv._ConvNd)][-1]
    distance = F.l1_loss(reconstruction, images)
    assert model.discriminator is not None
    score = -model.discriminator(reconstruction).mean()
    norms = []
    for part in (distance, score):
        model.zero_grad()
        part.backward(retain_graph=True)
        assert last.weight.grad is not None
        norms.append(last.weight.grad.norm())
    expected = 0.5 * norms[0] / (norms[1] + 1e-4)
    assert_close(terms["adversarial_weight"], expected)
    whole = distance + quantized.loss + expected * score + terms["discriminator_loss"]
    assert_close(loss, whole)
    assert not terms["adversarial_weight"].requires_grad


def test_the_non_saturating_loss_is_that_of_each_images_mean_score() -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(4, 1, "non_saturating")
    images, others = pictures(), pictures()
    means = discriminator(others).mean(dim=(1, 2, 3))
    expected = -torch.sigmoid(means).log().mean()
    assert_close(discriminator.play(images, others).adversarial, expected)


def test_lecam_is_its_formula_with_the_means_of_the_steps_before() -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(4, 1, "hinge", lecam=0.5).double()
    plain = PatchDiscriminator(4, 1, "hinge").double()
    plain.load_state_dict(discriminator.state_dict(), strict=False)
    of_real, of_fake = 0.0, 0.0
    images, others = pictures().double(), pictures().double()
    for step in range(3):
        seen: list[tuple[float, float]] = []
        for _ in range(2):  # micro-batches
            images, others = 2 * images, others / 2
            real, fake = plain(images), plain(others)
            expected = plain.play(images, others).discriminator
            if step:
                term = F.relu(real - of_fake).square().mean()
                expected = expected + 0.5 * (term + F.relu(of_real - fake).square().mean())
            found = discriminator.play(images, others).discriminator
            assert_close(found, expected, check_dtype=False)
            seen.append((real.mean().item(), fake.mean().item()))
        after_step(discriminator)
        discriminator.eval().play(images, others)  # what is not trained on does not count
        discriminator.train()
        weight = 0.01 / (1 - 0.99 ** (step + 1))
        of_real += weight * (sum(r for r, _ in seen) / 2 - of_real)
        of_fake += weight * (sum(f for _, f in seen) / 2 - of_fake)


def test_the_discriminator_waits_for_its_start_in_training_steps() -> None:
    model, images = judged(adversarial_start=1), pictures()
    model.eval()(images)
    _, terms = model.train()(images)
    assert float(terms["discriminator_loss"]) == 0
    loss, terms = model(images)
    loss.backward()
    assert float(terms["discriminator_loss"].detach()) > 0
    assert any(float(g.abs().sum()) > 0 for g in gradients(model, "discriminator").values())


def test_before_the_start_every_parameter_has_a_gradient_of_zero_from_the_game() -> None:
    model = judged(adversarial_start=1)
    model(pictures())[0].backward()
    found = gradients(model, "discriminator")
    assert len(found) == len(list(model.discriminator.parameters()))  # pyright: ignore
    assert all(float(gradient.abs().sum()) == 0 for gradient in found.values())
