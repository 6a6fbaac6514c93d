"""Checkpoints in the layout of SimVQ's authors give the images that their architecture gives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from simvq_moe.models.image.official_layout import image_tokenizer_from

HIDDEN, MULTIPLIERS, BLOCKS, WIDTH, CODES = 32, (1, 2, 2, 4), 2, 16, 24
State = dict[str, Tensor]


def official_state() -> State:
    """Random weights of every name of the authors' model, at a quarter of its channels."""
    torch.manual_seed(0)
    state: State = {}

    def conv(name: str, given: int, made: int, size: int, bias: bool = True) -> None:
        scale = (given * size * size) ** -0.5
        state[f"{name}.weight"] = torch.randn(made, given, size, size).double() * scale
        if bias:
            state[f"{name}.bias"] = torch.randn(made).double() * 0.1

    def norm(name: str, channels: int) -> None:
        state[f"{name}.weight"] = 1 + 0.1 * torch.randn(channels).double()
        state[f"{name}.bias"] = 0.1 * torch.randn(channels).double()

    def block(name: str, given: int, made: int) -> None:
        norm(f"{name}.norm1", given)
        norm(f"{name}.norm2", made)
        conv(f"{name}.conv1", given, made, 3, bias=False)
        conv(f"{name}.conv2", made, made, 3, bias=False)
        if given != made:
            conv(f"{name}.nin_shortcut", given, made, 1, bias=False)

    widths = [HIDDEN * multiplier for multiplier in MULTIPLIERS]
    lowest, last = widths[-1], len(widths) - 1
    conv("encoder.conv_in", 3, HIDDEN, 3, bias=False)
    given = HIDDEN
    for i, made in enumerate(widths):
        for j in range(BLOCKS):
            block(f"encoder.down.{i}.block.{j}", given, made)
            given = made
        if i < last:
            conv(f"encoder.down.{i}.downsample", made, made, 3)
    for side in ("encoder", "decoder"):
        for j in range(BLOCKS):
            block(f"{side}.mid_block.{j}", lowest, lowest)
    norm("encoder.norm_out", lowest)
    conv("encoder.conv_out", lowest, WIDTH, 1)
    conv("decoder.conv_in", WIDTH, lowest, 3)
    for i in reversed(range(len(widths))):
        for j in range(BLOCKS):
            block(f"decoder.up.{i}.block.{j}", given, widths[i])
            given = widths[i]
        if i:
            conv(f"decoder.up.{i}.upsample.conv1", given, 4 * given, 3)
    norm("decoder.norm_out", given)
    conv("decoder.conv_out", given, 3, 3)
    state["quantize.embedding.weight"] = torch.randn(CODES, WIDTH).double()
    state["quantize.embedding_proj.weight"] = torch.randn(WIDTH, WIDTH).double() * 0.3
    state["quantize.embedding_proj.bias"] = torch.randn(WIDTH).double() * 0.3
    state["loss.discriminator.main.0.weight"] = torch.randn(4, 3, 4, 4)
    return state


def layer(state: State, name: str, x: Tensor, **options: int) -> Tensor:
    return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), **options)


def normalized(state: State, name: str, x: Tensor) -> Tensor:
    x = F.group_norm(x, 32, state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)
    return x * torch.sigmoid(x)


def residual(state: State, name: str, x: Tensor) -> Tensor:
    h = layer(state, f"{name}.conv1", normalized(state, f"{name}.norm1", x), padding=1)
    h = layer(state, f"{name}.conv2", normalized(state, f"{name}.norm2", h), padding=1)
    shortcut = f"{name}.nin_shortcut"
    return h + (layer(state, shortcut, x) if f"{shortcut}.weight" in state else x)


def twice_as_large(x: Tensor) -> Tensor:
    """Channel (2 row + column) C + c of a place is channel c of one of its four pixels."""
    batch, channels, height, width = x.shape
    out = x.new_empty(batch, channels // 4, 2 * height, 2 * width)
    for row in range(2):
        for column in range(2):
            first = (2 * row + column) * (channels // 4)
            out[:, :, row::2, column::2] = x[:, first : first + channels // 4]
    return out


def official_forward(state: State, images: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and reconstruction, written down from the architecture."""
    x = layer(state, "encoder.conv_in", images, padding=1)
    last = len(MULTIPLIERS) - 1
    for i in range(last + 1):
        for j in range(BLOCKS):
            x = residual(state, f"encoder.down.{i}.block.{j}", x)
        if i < last:
            x = layer(state, f"encoder.down.{i}.downsample", x, stride=2, padding=1)
    for j in range(BLOCKS):
        x = residual(state, f"encoder.mid_block.{j}", x)
    z = layer(state, "encoder.conv_out", normalized(state, "encoder.norm_out", x))
    codes = state["quantize.embedding.weight"] @ state["quantize.embedding_proj.weight"].T
    codes = codes + state["quantize.embedding_proj.bias"]
    ids = torch.cdist(z.movedim(1, -1).flatten(0, 2), codes).argmin(1)
    x = codes[ids].view(*z.movedim(1, -1).shape).movedim(-1, 1)
    x = layer(state, "decoder.conv_in", x, padding=1)
    for j in range(BLOCKS):
        x = residual(state, f"decoder.mid_block.{j}", x)
    for i in reversed(range(last + 1)):
        for j in range(BLOCKS):
            x = residual(state, f"decoder.up.{i}.block.{j}", x)
        if i:
            x = twice_as_large(layer(state, f"decoder.up.{i}.upsample.conv1", x, padding=1))
    x = layer(state, "decoder.conv_out", normalized(state, "decoder.norm_out", x), padding=1)
    return ids.view(len(images), z.shape[2], z.shape[3]), x


def test_an_official_state_dict_gives_the_ids_and_images_of_its_architecture() -> None:
    state = official_state()
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64) * 2 - 1
    tokenizer = image_tokenizer_from(state)
    ids, expected = official_forward(state, images)
    assert ids.unique().numel() > 2
    reconstruction, quantized = tokenizer.reconstruct(images)
    assert_close(quantized.ids, ids)
    assert_close(reconstruction, expected)
    assert_close(tokenizer.decode(tokenizer.encode(images)), expected)


def test_moving_averages_replace_the_weights_that_have_one() -> None:
    state = official_state()
    averages = {
        f"model_ema.{name.replace('.', '')}": 0.9 * weight
        for name, weight in state.items()
        if name != "quantize.embedding.weight"
    }
    images = torch.rand(1, 3, 16, 16, dtype=torch.float64) * 2 - 1
    tokenizer = image_tokenizer_from(state | averages, averages=True)
    averaged = {
        name: state[name] if name == "quantize.embedding.weight" else 0.9 * weight
        for name, weight in state.items()
    }
    assert_close(tokenizer.reconstruct(images)[0], official_forward(averaged, images)[1])


def test_other_layouts_are_named() -> None:
    state = official_state()
    with pytest.raises(ValueError, match=r"has no model_ema\.\*: use averages=False"):
        image_tokenizer_from(state, averages=True)
    with pytest.raises(ValueError, match="no official layout"):
        image_tokenizer_from({"weight": torch.ones(1)})
    state["encoder.attention.weight"] = torch.ones(1)
    with pytest.raises(ValueError, match=r"no official layout: .*encoder\.attention\.weight"):
        image_tokenizer_from(state)
