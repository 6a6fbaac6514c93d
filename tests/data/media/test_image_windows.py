"""Windows of whole images: every pixel once, and the sides of the crops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simvq_moe.data.images import image_crops
from simvq_moe.data.media.image_windows import ImageWindows, image_windows
from simvq_moe.errors import ConfigError

SIZES = [(16, 16), (7, 40), (33, 5), (17, 31)]
"""Height and width, in turn."""


def folder_of(folder: Path, count: int, sizes: list[tuple[int, int]] | None = None) -> Path:
    """Different images of noise."""
    folder.mkdir()
    for i in range(count):
        height, width = (sizes or SIZES)[i % len(sizes or SIZES)]
        noise = np.random.default_rng(i).integers(256, size=(height, width, 3))
        Image.fromarray(noise.astype(np.uint8)).save(folder / f"{i:02}.png")
    return folder


def assembled(windows: ImageWindows, number: int) -> np.ndarray:
    """An image from its windows, without what lies beyond its edges."""
    mine = np.flatnonzero(windows.image_of == number)
    height, width = windows.sizes[number]
    side = windows.size
    whole = np.full((height + side, width + side, 3), -1)
    pixels = ((windows.batch(mine).permute(0, 2, 3, 1) + 1) * 127.5).round().int().numpy()
    for (top, left), window in zip(windows.places[mine], pixels, strict=True):
        assert (whole[top : min(top + side, height), left : min(left + side, width)] == -1).all()
        whole[top : top + side, left : left + side] = window
    return whole[:height, :width]


def test_windows_cover_every_pixel_of_every_image_once(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "images", 40)
    sides = image_windows(str(source), size=8)
    names = [name for windows in sides for name in windows.names]
    assert sorted(names) == sorted(path.name for path in source.iterdir())
    for windows in sides:
        for number, name in enumerate(windows.names):
            with Image.open(source / name) as image:
                np.testing.assert_array_equal(assembled(windows, number), np.asarray(image))


def test_a_batch_is_the_same_in_whatever_order_it_is_read(tmp_path: Path) -> None:
    windows, _ = image_windows(str(folder_of(tmp_path / "images", 30)), size=8)
    together = windows.batch(np.arange(len(windows)))
    for i in np.random.default_rng(0).permutation(len(windows))[:20]:
        np.testing.assert_array_equal(windows.batch(np.array([i]))[0], together[i])


def test_digests_tell_sizes_of_windows_apart_also_where_each_holds_a_whole_image(
    tmp_path: Path,
) -> None:
    source = str(folder_of(tmp_path / "images", 40))
    found = [part.digest() for size in (40, 48) for part in image_windows(source, size=size)]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("count", [6, 40])
def test_sides_are_those_of_the_crops(count: int, tmp_path: Path) -> None:
    # each image has a colour of its own, by which a crop tells where it is from
    source = tmp_path / "images"
    source.mkdir()
    for i in range(count):
        pixels = np.full((24, 120, 3), i, dtype=np.uint8)
        pixels[:, :98] += 100  # the columns that training sees where images are split
        Image.fromarray(pixels).save(source / f"{i:02}.png")
    crops = image_crops(str(source), size=16, crops=200, held_out_crops=200, seed=0)
    colours = [
        set(((part.batch(np.arange(len(part))) + 1) * 127.5).round().int().unique().tolist())
        for part in (*crops, *image_windows(str(source), size=16))
    ]
    crops_of, windows_of = colours[:2], colours[2:]
    assert crops_of[0] <= windows_of[0]
    assert crops_of[1] <= windows_of[1]
    assert not windows_of[0] & windows_of[1]
    assert len(windows_of[0] | windows_of[1]) == 2 * count


def test_a_source_of_held_out_images_is_the_other_side_alone(tmp_path: Path) -> None:
    source, other = folder_of(tmp_path / "a", 30), folder_of(tmp_path / "b", 4)
    train, held_out = image_windows(str(source), size=8, held_out_source=str(other))
    assert sorted(held_out.names) == [f"{i:02}.png" for i in range(4)]
    # the first four are copies of held-out ones
    assert sorted(train.names) == [f"{i:02}.png" for i in range(4, 30)]


def test_images_resized_to_a_window_are_one_window_each(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "images", 30, [(16, 16), (16, 24)])
    train, held_out = image_windows(str(source), size=16, shorter_side=16)
    assert (len(train), len(held_out)) == (len(train.names), len(held_out.names))
    for number, name in enumerate(train.names):
        with Image.open(source / name) as image:
            left = (image.width - 16) // 2
            expected = np.asarray(image)[:, left : left + 16]
        np.testing.assert_array_equal(assembled(train, number), expected)


def test_a_damaged_image_is_black_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = folder_of(tmp_path / "images", 30, [(40, 40)])
    damaged = source / "03.png"
    damaged.write_bytes(damaged.read_bytes()[:200])
    windows, _ = image_windows(
        str(source), size=8, held_out_source=str(folder_of(tmp_path / "b", 1))
    )
    number = windows.names.index(damaged.name)
    assert (assembled(windows, number) == 0).all()
    assert caplog.text.count(damaged.name) == 1
    next_one = (number + 1) % len(windows.names)
    assert assembled(windows, next_one).std() > 10


@pytest.mark.parametrize("source", ["nowhere", "hf-stream:somebody/images"])
def test_sources_that_can_not_be_read_whole_are_refused(source: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.source"):
        image_windows(source, size=8)


def test_a_few_images_smaller_than_a_window_are_refused_with_the_size_that_they_need(
    tmp_path: Path,
) -> None:
    for i in range(2):
        Image.new("RGB", (6, 5), (i, i, i)).save(tmp_path / f"{i}.png")
    with pytest.raises(ConfigError, match="has no image that is held out") as error:
        image_windows(str(tmp_path), size=8)
    assert "; 2 are images smaller than 39 x 8 pixels" in str(error.value)
    assert str(error.value).endswith("(the largest of them: 6 x 5)")
