"""Image tokenizers from checkpoints of SimVQ's authors (arXiv:2411.02038): the same images and ids.

A checkpoint of theirs holds `state_dict`; of its names these are read, i counting resolutions from
the full one on and j blocks:

| theirs | ours |
| --- | --- |
| `encoder.conv_in` | `encoder.down.0` |
| `encoder.down.i.block.j` | `encoder.down.*`, blocks and downsampling in order |
| `encoder.down.i.downsample` | a stride-2 convolution of `encoder.down` |
| `encoder.mid_block.j`, `encoder.norm_out` | `encoder.middle.j`, `encoder.norm` |
| `encoder.conv_out`, `decoder.conv_in` | `to_latent`, `from_latent` |
| `decoder.mid_block.j`, `decoder.norm_out` | `decoder.middle.j`, `decoder.norm` |
| `decoder.up.i.block.j` | `decoder.up.*`, from the lowest resolution on |
| `decoder.up.i.upsample.conv1` | `conv` of an `Upsample`, its output channels in another order |
| `decoder.conv_out` | `decoder.to_pixels` |
| `quantize.embedding`, `quantize.embedding_proj` | `quantizer.bank`, see `quantizers.interchange` |

Blocks have `norm1`, `conv1`, `norm2` and `conv2` on both sides; their `nin_shortcut` is our `skip`.
`loss.*` is left out. `model_ema.*` are moving averages under the same names without dots; the
frozen embedding has none. Sizes follow from shapes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TypedDict

import torch
from torch import Tensor

from simvq_moe.models.image.tokenizer import ImageTokenizer
from simvq_moe.quantizers.interchange import simvq_from

PARTS = ("encoder.", "decoder.", "quantize.")
AXES = {
    "encoder.conv_in.weight": 4,
    "quantize.embedding.weight": 2,
    "quantize.embedding_proj.weight": 2,
}
"""Axes of the tensors that sizes are read from."""
AVERAGES = "model_ema."


class Sizes(TypedDict):
    """Sizes of an `ImageTokenizer` of the architecture "vqgan"."""

    hidden: int
    downsamplings: int
    residual_blocks: int
    channel_multipliers: tuple[int, ...]


def image_tokenizer_from(state: Mapping[str, Tensor], *, averages: bool = False) -> ImageTokenizer:
    """The tokenizer of an official state dict, in evaluation mode.

    Args:
        state: as in the checkpoint: `torch.load(file, map_location="cpu")["state_dict"]`.
        averages: take the moving averages of the weights, with which the authors evaluate.

    Raises:
        ValueError: names are missing, or are none of this architecture.
    """
    weights = {name: w for name, w in state.items() if name.startswith(PARTS)}
    if averages:
        found = {name: AVERAGES + name.replace(".", "") for name in weights}
        if not any(average in state for average in found.values()):
            raise ValueError(f"the state dict has no {AVERAGES}*: use averages=False")
        weights |= {name: state[key] for name, key in found.items() if key in state}
    sizes = sizes_of(weights)
    quantizer = simvq_from(
        {name.removeprefix("quantize."): w for name, w in weights.items() if "quantize." in name}
    )
    tokenizer = ImageTokenizer(quantizer, architecture="vqgan", **sizes)
    tokenizer.to(weights["encoder.conv_in.weight"].dtype)
    names = dict(_names(sizes["downsamplings"], sizes["residual_blocks"]))
    mapped = {_ours(name, names): w for name, w in weights.items() if "quantize." not in name}
    for name in mapped:
        if re.fullmatch(r"decoder\.up\.\d+\.conv\.(weight|bias)", name):
            mapped[name] = _sub_pixels(mapped[name])
    own = {f"quantizer.{name}": w for name, w in quantizer.state_dict().items()}
    try:
        tokenizer.load_state_dict(mapped | own)
    except RuntimeError as error:
        raise ValueError(f"no official layout: {' '.join(str(error).split())}") from None
    return tokenizer.eval()


def sizes_of(state: Mapping[str, Tensor]) -> Sizes:
    """The sizes of the tokenizer in an official state dict.

    Raises:
        ValueError: it has another layout.
    """
    if not state.keys() >= AXES.keys():
        raise ValueError(f"no official layout: {', '.join(sorted(state)[:5])}, ...")
    for name, tensor in state.items():
        if name.startswith(PARTS):
            _check(name, tensor)
    hidden = len(state["encoder.conv_in.weight"])
    firsts = _numbered(state, r"encoder\.down\.(\d+)\.block\.0\.conv1\.weight")
    blocks = _numbered(state, r"encoder\.down\.0\.block\.(\d+)\.conv1\.weight")
    return {
        "hidden": hidden,
        "downsamplings": len(firsts) - 1,
        "residual_blocks": len(blocks),
        "channel_multipliers": tuple(max(1, len(state[name]) // hidden) for name in firsts),
    }


def _check(name: str, tensor: Tensor) -> None:
    """Raise `ValueError` for what can't be a weight: of no axes, empty, of integers, or a view that
    repeats less memory than it claims."""
    room = 0
    if tensor.layout == torch.strided and tensor.is_floating_point():
        room = tensor.untyped_storage().nbytes() // tensor.element_size()
    axes = AXES.get(name, max(tensor.ndim, 1))
    if tensor.ndim != axes or not 0 < tensor.numel() <= room:
        kind = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
        raise ValueError(f"no official layout: {name} is {kind}")


def _numbered(weights: Mapping[str, Tensor], pattern: str) -> list[str]:
    """The names of a pattern, by the number in them."""
    found = {int(m[1]): name for name in weights if (m := re.fullmatch(pattern, name))}
    return [found[number] for number in sorted(found)]


def _names(last: int, blocks: int) -> Iterator[tuple[str, str]]:
    """Their modules and ours."""
    yield from (("encoder.conv_out", "to_latent"), ("decoder.conv_in", "from_latent"))
    yield from (("encoder.norm_out", "encoder.norm"), ("decoder.norm_out", "decoder.norm"))
    yield from (("encoder.conv_in", "encoder.down.0"), ("decoder.conv_out", "decoder.to_pixels"))
    for side in ("encoder", "decoder"):
        yield from ((f"{side}.mid_block.{j}", f"{side}.middle.{j}") for j in range(blocks))
    each = blocks + 1
    for i in range(last + 1):
        down, up = 1 + i * each, (last - i) * each
        for j in range(blocks):
            yield f"encoder.down.{i}.block.{j}", f"encoder.down.{down + j}"
            yield f"decoder.up.{i}.block.{j}", f"decoder.up.{up + j}"
        yield f"encoder.down.{i}.downsample", f"encoder.down.{down + blocks}"
        yield f"decoder.up.{i}.upsample.conv1", f"decoder.up.{up + blocks}.conv"


def _ours(name: str, names: Mapping[str, str]) -> str:
    """Our name of a weight; one of another architecture stays as it is."""
    module, _, rest = name.rpartition(".")
    if module in names:
        return f"{names[module]}.{rest}"
    block, _, layer = module.rpartition(".")
    layer = "skip" if layer == "nin_shortcut" else layer
    return f"{names[block]}.{layer}.{rest}" if block in names else name


@torch.no_grad()
def _sub_pixels(weights: Tensor) -> Tensor:
    """Output channels from (pixel, channel) order to (channel, pixel), that of pixel_shuffle."""
    return weights.unflatten(0, (4, -1)).transpose(0, 1).flatten(0, 1)
