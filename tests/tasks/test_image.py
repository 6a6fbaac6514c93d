"""Images in the training loop: discriminator, measures on demand, what can't run is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from torch import Tensor, nn
from torch.testing import assert_close
from torchmetrics.image.fid import FrechetInceptionDistance

from simvq_moe.config.checks import check
from simvq_moe.config.schema import (
    Config,
    DataConfig,
    ImageTokenizerConfig,
    TrainConfig,
)
from simvq_moe.engine.world import World
from simvq_moe.errors import ConfigError
from simvq_moe.models.image.losses import LPIPS
from simvq_moe.models.image.tokenizer import ImageTokenizer
from simvq_moe.quantizers.kinds.simvq import SimVQOptions
from simvq_moe.tasks.image import ImageTokenizerTask
from simvq_moe.tasks.image_measures import ImageMeasures, as_bytes, optional_measures
from simvq_moe.tasks.registry import build_model, build_task
from tests.launching import metrics
from tests.short_training import train_flags, train_two_steps
from tests.two_ranks import TwoRanks

JUDGED = ImageTokenizerConfig(
    architecture="vqgan",
    hidden=4,
    channel_multipliers=(1, 1, 2),
    attention=True,
    l1_weight=1.0,
    ssim_weight=0.1,
    adversarial_weight=0.5,
    adversarial_start=1,
    discriminator_hidden=2,
    discriminator_layers=2,
)
CONFIG = Config(
    quantizer=SimVQOptions(codes=16, width=4),
    image_tokenizer=JUDGED,
    train=TrainConfig(batch_size=4),
)


def test_two_steps_with_a_discriminator_leave_measures(tmp_path: Path, world: World) -> None:
    summary = train_two_steps(CONFIG, tmp_path, world)
    assert {"val/psnr", "val/ssim", "val/codes/used"} <= summary.keys()
    first, second = metrics(tmp_path / "run")
    assert first["train/discriminator_loss"] == first["train/adversarial_weight"] == 0
    assert second["train/discriminator_loss"] > 0
    assert second["train/adversarial_weight"] > 0


def test_counts_of_the_start_follow_accumulation() -> None:
    model = build_model(replace(CONFIG, train=replace(CONFIG.train, accumulation=3)))
    assert isinstance(model, ImageTokenizer)
    assert model.adversarial_start == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "small"}, r"channel_multipliers \(1, 1, 2\) means nothing to .*'small'"),
        (
            {"channel_multipliers": (1, 2)},
            r"channel_multipliers \(1, 2\) .*: give 3, each at least",
        ),
        ({"channel_multipliers": (1, 0, 2)}, r"channel_multipliers \(1, 0, 2\) .*: give 3, each"),
        ({"residual_blocks": 0}, r"residual_blocks 0 with .*architecture 'vqgan': use at least 1"),
        ({"adversarial_weight": 0.0}, r"adversarial_start 1 means nothing with .*_weight 0"),
        ({"adversarial_start": 800}, r"adversarial_start 800 >= train.steps 800"),
        ({"discriminator_layers": 4}, r"discriminator_layers 4 with data.image_size 32: nothing"),
        ({"lpips_file": "vgg.pth"}, r"lpips_file 'vgg.pth' means nothing with .*_weight 0"),
        ({"ssim_weight": -1.0}, r"ssim_weight -1.0 < 0"),
    ],
)
def test_what_cannot_run_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=rf"image_tokenizer\.{words}"):
        check(replace(CONFIG, image_tokenizer=replace(JUDGED, **changes)))


def test_sizes_of_data_that_do_not_fit_are_named() -> None:
    for changes, words in (
        ({"shorter_side": 16}, r"data\.shorter_side 16 < data\.image_size 32"),
        ({"image_size": 30}, r"data\.image_size 30 does not divide by 2\^2"),
    ):
        with pytest.raises(ConfigError, match=words):
            check(replace(CONFIG, data=replace(CONFIG.data, **changes)))
    other = replace(CONFIG, task="audio_tokenizer", image_tokenizer=ImageTokenizerConfig())
    with pytest.raises(ConfigError, match=r"text_field 'a' with task 'audio_tokenizer'"):
        check(replace(other, data=replace(other.data, text_field="a")))


def test_a_loss_without_its_network_is_named(tmp_path: Path) -> None:
    file = tmp_path / "vgg.pth"
    image = replace(JUDGED, lpips_weight=1.0, lpips_file=str(file))
    config = replace(CONFIG, image_tokenizer=image)
    with pytest.raises(ConfigError, match=r"lpips_weight 1\.0: .*vgg\.pth is missing: put torch"):
        ImageTokenizerTask.check_files(config)
    model = build_model(config)  # which can be evaluated all the same
    assert isinstance(model, ImageTokenizer)
    assert model.distance.lpips is None
    with pytest.raises(ConfigError, match=r"--lpips: .*vgg\.pth is missing"):
        optional_measures(image, ["lpips"])


def test_rfid_without_its_package_or_network_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    where = "simvq_moe.tasks.image_measures.find_spec"
    monkeypatch.setattr(where, lambda _: None)
    with pytest.raises(ConfigError, match="--rfid needs torch-fidelity: pip install"):
        optional_measures(JUDGED, ["rfid"])


class Colours(nn.Module):
    """Features that need no weights: the mean of each channel."""

    num_features = 3

    def forward(self, images: Tensor) -> Tensor:
        return images.double().mean(dim=(2, 3))


def test_rfid_is_the_frechet_distance_of_the_features_of_all_images() -> None:
    torch.manual_seed(0)
    images = torch.rand(12, 3, 16, 16) * 2 - 1
    others = (images * torch.tensor([0.5, 0.8, 1.0])[:, None, None] + 0.1).clamp(-1, 1)
    measures = ImageMeasures(fid=FrechetInceptionDistance(Colours(), normalize=False))
    sums = [measures.sums(images[part], others[part]) for part in (slice(8), slice(8, None))]
    total = {name: float(sum(one[name] for one in sums)) for name in sums[0]}
    a, b = (as_bytes(x).double().mean(dim=(2, 3)).numpy() for x in (images, others))
    covariances = [np.cov(x, rowvar=False) for x in (a, b)]
    mixed = sqrtm(covariances[0] @ covariances[1])
    distance = ((a.mean(0) - b.mean(0)) ** 2).sum()
    expected = distance + np.trace(covariances[0] + covariances[1] - 2 * np.real(mixed))
    # torchmetrics returns float32
    assert_close(measures.means(total)["val/rfid"], float(expected), rtol=1e-5, atol=0)


def random_lpips() -> LPIPS:
    """The network with weights that need no download."""
    heads = {
        f"lin{i}.model.1.weight": torch.rand(1, n, 1, 1)
        for i, n in enumerate((64, 128, 256, 512, 512))
    }
    numbers = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    widths = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
    vgg = {f"features.{n}.bias": torch.zeros(widths[i + 1]) for i, n in enumerate(numbers)}
    for i, n in enumerate(numbers):
        vgg[f"features.{n}.weight"] = torch.randn(widths[i + 1], widths[i], 3, 3) * 0.05
    return LPIPS(vgg, heads)


def test_sums_over_batches_give_the_means_over_all_images() -> None:
    torch.manual_seed(0)
    images = torch.rand(5, 3, 16, 16) * 2 - 1
    others = (images + 0.1 * torch.randn_like(images)).clamp(-1, 1)
    lpips = random_lpips()
    measures = ImageMeasures(lpips)
    sums = [measures.sums(images[part], others[part]) for part in (slice(3), slice(3, None))]
    total = {name: float(sum(one[name] for one in sums)) for name in sums[0]}
    means = measures.means(total)
    squared = (others - images).double().square().mean(dim=(1, 2, 3))
    assert_close(means["val/mse"], float(squared.mean()))
    assert_close(means["val/psnr"], float((10 * torch.log10(4 / squared)).mean()))
    # float32 sums in another order
    assert_close(means["val/lpips"], float(lpips(others, images).mean()), rtol=1e-5, atol=0)
    empty = ImageMeasures().sums(images[:0], images[:0])
    assert {name: float(value) for name, value in empty.items()} == dict.fromkeys(empty, 0.0)


@pytest.mark.parametrize("largest", [1.0, 1.1, 50.0])
def test_measures_are_of_the_pictures_that_are_seen(largest: float) -> None:
    torch.manual_seed(0)
    images = (torch.rand(2, 3, 16, 16) * 2 - 1).round()
    others = torch.randn(2, 3, 16, 16) * largest
    measures = ImageMeasures(random_lpips(), FrechetInceptionDistance(Colours(), normalize=False))
    seen = measures.sums(images, others.clamp(-1, 1))
    assert_close(measures.sums(images, others), seen, rtol=0, atol=0)
    overshot = measures.means(
        {name: float(value) for name, value in measures.sums(images, images * largest).items()}
    )
    assert overshot["val/mse"] == overshot["val/lpips"] == 0
    assert overshot["val/psnr"] > 100
    assert_close(overshot["val/ssim"], 1.0)


@pytest.mark.parametrize("memory", [4096, 0])
@pytest.mark.parametrize("changed", ["held_out_source", "train", "right columns", "nothing"])
def test_the_data_digest_is_of_both_sides(changed: str, memory: int, tmp_path: Path) -> None:
    folders = tmp_path / "train", tmp_path / "held_out"
    pixels = np.zeros((20, 100, 3), np.uint8)
    for folder in folders:
        folder.mkdir()
        for i in range(2):
            Image.fromarray(pixels + i).save(folder / f"{i}.bmp")
    own = None if changed == "right columns" else str(folders[1])
    data = DataConfig(
        source=str(folders[0]), held_out_source=own, image_size=16, crops=40, held_out_crops=10
    )
    if own:
        Image.fromarray(pixels + 9).save(folders[1] / "0.bmp")
        Image.fromarray(pixels + 8).save(folders[1] / "1.bmp")
    config = replace(CONFIG, data=replace(data, decoded_megabytes=memory))
    before = build_task(config).data_digest
    if changed == "right columns":
        pixels[:, 90:] = 3
        Image.fromarray(pixels).save(folders[0] / "0.bmp")
    elif changed != "nothing":
        folder = folders[1] if changed == "held_out_source" else folders[0]
        Image.fromarray(pixels + 200).save(folder / "0.bmp")
    assert (build_task(config).data_digest == before) == (changed == "nothing")


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [1, 2])
def test_two_ranks_play_the_same_game_as_one(
    tmp_path: Path, world: World, two_ranks: TwoRanks, stage: int
) -> None:
    flags = (
        *("--data.crops", "64", "--data.held_out_crops", "18", "--data.image_size", "16"),
        *("--quantizer.codes", "16", "--quantizer.width", "4", "--image_tokenizer.hidden", "4"),
        *("--image_tokenizer.architecture", "vqgan", "--image_tokenizer.attention", "True"),
        *("--image_tokenizer.adversarial_weight", "0.5", "--image_tokenizer.adversarial_start"),
        *("2", "--image_tokenizer.discriminator_hidden", "2", "--train.zero_stage", str(stage)),
        *("--image_tokenizer.discriminator_layers", "2", "--train.steps", "5"),
        *("--train.batch_size", "8", "--train.log_every", "1", "--train.accumulation", "2"),
        *("--train.eval_every", "5"),
    )
    one = metrics(train_flags(world, tmp_path, "--name", "one", *flags))
    two = metrics(two_ranks(train_flags, tmp_path, "--name", "two", *flags)[0])
    played = [line["train/adversarial_weight"] > 0 for line in one]
    assert played == [False, False, True, True, True]
    for a, b in zip(one, two, strict=True):
        for name in a:
            if name.endswith("_loss") or name in ("train/adversarial_weight", "val/mse"):
                # float32 sums in another order, over five steps of Adam
                assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)
