"""A checkpoint of SimVQ's authors (arXiv:2411.02038) as a run, for `eval`, `encode` and `decode`.

    from pathlib import Path
    from simvq_moe.config.schema import DataConfig
    from simvq_moe.inference.official_checkpoint import write_run

    images = DataConfig(
        source="imagenet/train", crops=1_281_167, image_size=128, shorter_side=128,
        held_out_source="imagenet/val", held_out_crops=50_000,
    )
    write_run(Path("epoch=49-step=250250.ckpt"), Path("runs/official"), images)

`simvq-moe eval runs/official --rfid --lpips` then measures it, and `simvq-moe encode runs/official
--out runs/codes` gives a language model its codes.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from simvq_moe.config.schema import Config, DataConfig, ImageTokenizerConfig
from simvq_moe.errors import ConfigError
from simvq_moe.files.regular import BrokenFileError
from simvq_moe.files.tensors import read_checkpoint, weights_sha256
from simvq_moe.files.unfinished import check_free, filling
from simvq_moe.inference.fold import write_model
from simvq_moe.models.image.official_layout import image_tokenizer_from, sizes_of
from simvq_moe.quantizers.kinds.simvq import SimVQOptions


def write_run(checkpoint: Path, out: Path, data: DataConfig, *, averages: bool = True) -> Config:
    """Write config.yaml and model.safetensors of an image tokenizer; the config.

    Args:
        checkpoint: file of theirs, whose weights alone are read.
        out: a new folder.
        data: images that the run reads where a command names no others.
        averages: take the moving averages of the weights, with which the authors evaluate.

    Raises:
        ConfigError: the file is not there, or has another layout, or `out` is not empty.
    """
    check_free(out)
    try:
        state = _state_dict(read_checkpoint(checkpoint))
        tokenizer = image_tokenizer_from(state, averages=averages)
    except BrokenFileError as error:
        raise ConfigError(
            f"{checkpoint} is no checkpoint of SimVQ's authors: it {error.reason}"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{checkpoint} is no checkpoint of SimVQ's authors: {error}") from None
    q = state["quantize.embedding.weight"]
    width = len(state["quantize.embedding_proj.weight"])
    config = Config(
        name=out.name,
        runs_dir=str(out.parent),
        data=data,
        quantizer=SimVQOptions(
            codes=len(q),
            width=width,
            base_width=None if q.shape[1] == width else q.shape[1],
            bias="quantize.embedding_proj.bias" in state,
        ),
        image_tokenizer=ImageTokenizerConfig(architecture="vqgan", **sizes_of(state)),
    )
    weights = tokenizer.float().state_dict()
    with filling(out, "write_run", {"weights": weights_sha256(weights)}):
        write_model(out, config, weights, {})
    return config


def _state_dict(content: object) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name.

    Raises:
        ValueError: it has none, or something beside them.
    """
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(weight, Tensor) for name, weight in state.items()
    ):
        raise ValueError("it holds no state_dict of tensors")
    return state
