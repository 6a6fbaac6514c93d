"""Crops come from real photos, and no held-out pixel is seen in training."""

import itertools
import logging
import os
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from simvq_moe.data.image_sets import ImageCrops, LazyCrops
from simvq_moe.data.images import check_source, image_crops
from simvq_moe.data.media.pictures import (
    PHOTOS,
    Embedded,
    FilePicture,
    NoPictureError,
    RowPicture,
    Spooled,
    files,
)
from simvq_moe.errors import ConfigError

SIZE = 8


def column_image(width=100, height=40, start=0):
    """An image whose red channel is the column, so that a crop tells where it came from."""
    columns = np.arange(start, start + width, dtype=np.uint8)
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = columns
    pixels[..., 1] = np.arange(height, dtype=np.uint8)[:, None]
    return Image.fromarray(pixels)


def plain_image(value):
    return Image.new("RGB", (20, 20), (value, value, value))


@pytest.fixture
def few(tmp_path):
    (tmp_path / "deep").mkdir()
    column_image().save(tmp_path / "a.png")
    column_image().save(tmp_path / "deep" / "b.bmp")
    return tmp_path


@pytest.fixture
def many(tmp_path):
    for i in range(40):
        plain_image(i).save(tmp_path / f"{i:02}.png")
    return tmp_path


def crops(source, count=50, held_out=20, size=SIZE, seed=0, **options):
    """Both sets, in memory."""
    train, late = image_crops(
        str(source), size=size, crops=count, held_out_crops=held_out, seed=seed, **options
    )
    assert isinstance(train, ImageCrops)
    assert isinstance(late, ImageCrops)
    return train, late


def test_photos_give_the_default_set_without_importing_their_packages():
    before = set(sys.modules)
    train, held_out = crops("photos", 18_000, 1_026, 32)
    assert not {"skimage", "sklearn", "pooch"} & (set(sys.modules) - before)
    assert train.images.shape == (18_000, 3, 32, 32)
    assert held_out.images.shape == (1_026, 3, 32, 32)
    assert train.images.dtype == held_out.images.dtype == torch.uint8
    # 2,000 crops of each photo lie together, and the nine photos look different
    means = train.images.reshape(len(PHOTOS), 2_000, 3, -1).double().mean((1, 3))
    assert torch.cdist(means, means).add(torch.eye(9) * 99).min() > 1
    # the photos fill the range of a byte
    assert int(train.images.min()) < 5
    assert int(train.images.max()) > 250


def test_training_crops_touch_no_held_out_column(few):
    train, held_out = crops(few, 2_000, 2_000)
    assert sorted(set(train.images[:, 0].flatten().tolist())) == list(range(82))
    assert sorted(set(held_out.images[:, 0].flatten().tolist())) == list(range(82, 100))


def test_a_crop_is_a_square_of_neighbouring_pixels(few):
    train, _ = crops(few)
    columns, rows = train.images[:, 0].int(), train.images[:, 1].int()
    assert torch.equal(columns - columns[:, :1, :1], torch.arange(SIZE).expand(50, SIZE, SIZE))
    assert torch.equal(rows - rows[:, :1, :1], torch.arange(SIZE)[:, None].expand(50, SIZE, SIZE))


def test_every_place_is_drawn(few):
    train, held_out = crops(few, 4_000, 2_000)
    assert set(train.images[:, 1, 0, 0].tolist()) == set(range(40 - SIZE + 1))
    assert set(train.images[:, 0, 0, 0].tolist()) == set(range(82 - SIZE + 1))
    assert set(held_out.images[:, 0, 0, 0].tolist()) == set(range(82, 100 - SIZE + 1))


def test_batches_map_bytes_onto_minus_one_to_one(few):
    train, _ = crops(few)
    batch = train.batch(np.array([3, 0, 3]))
    assert batch.dtype == torch.float32
    torch.testing.assert_close(batch, train.images[[3, 0, 3]].float() / 255 * 2 - 1)
    torch.testing.assert_close(train.batch(torch.tensor([3, 0, 3])), batch)
    white_and_black = crops_of_values(train, [0, 255])
    assert white_and_black.unique().tolist() == [-1.0, 1.0]


def crops_of_values(crops, values):
    crops.images[: len(values)] = torch.tensor(values, dtype=torch.uint8)[:, None, None, None]
    return crops.batch(np.arange(len(values)))


def test_the_seed_alone_decides_the_crops(few):
    first, again, other = (crops(few, seed=seed) for seed in (0, 0, 1))
    for side in range(2):
        assert torch.equal(first[side].images, again[side].images)
        assert not torch.equal(first[side].images, other[side].images)


def test_many_files_are_split_by_file_and_drawn_from_equally(many):
    train, held_out = crops(many, 4 * 40, 40)
    seen, unseen = train.images.unique().tolist(), held_out.images.unique().tolist()
    assert sorted(seen + unseen) == list(range(40))
    assert 1 <= len(unseen) <= 10
    counts = torch.bincount(train.images[:, 0, 0, 0].int(), minlength=40)[seen]
    assert counts.max() - counts.min() <= 1


def test_fewer_crops_than_files_come_from_different_files(many):
    train, _ = crops(many, 10, 1)
    assert len(set(train.images[:, 0, 0, 0].tolist())) == 10


def test_other_modes_become_rgb(tmp_path):
    for mode in ("L", "P", "RGBA", "CMYK", "1"):
        column_image().convert(mode).save(tmp_path / f"{mode}.tiff")
    train, held_out = crops(tmp_path)
    assert train.images.shape == (50, 3, SIZE, SIZE)
    assert held_out.images.shape == (20, 3, SIZE, SIZE)


def test_one_image_file_is_a_source(few):
    train, _ = crops(few / "a.png")
    assert len(train) == 50


def test_bad_files_are_skipped_with_one_line_that_names_them(few, caplog):
    content = (few / "a.png").read_bytes()
    (few / "no_image.png").write_text("hello")
    (few / "truncated.png").write_bytes(content[: len(content) // 2])
    (few / "README.txt").write_text("about these images")
    plain_image(0).resize((SIZE - 1, 99)).save(few / "too_small.png")
    plain_image(0).resize((36, 99)).save(few / "narrow_right_part.png")
    with caplog.at_level(logging.WARNING):
        train, held_out = crops(few)
    unreadable, small = (record.getMessage() for record in caplog.records)
    assert "skipped 2 unreadable images: no_image.png, truncated.png" in unreadable
    assert small.endswith(
        "skipped 2 images smaller than 39 x 8 pixels, because few images are each cut into a left "
        "and a held-out right part (the largest of them: 36 x 99): narrow_right_part.png, "
        "too_small.png"
    )
    # what the truncated image would have given comes from the others
    assert (len(train), len(held_out)) == (50, 20)


def test_images_that_are_all_too_small_are_refused_with_the_size_that_they_need(many):
    with pytest.raises(ConfigError, match=r"data\.image_size 24: lower it") as error:
        crops(many, size=24)
    assert str(error.value).endswith(
        "larger images; 40 are images smaller than 24 x 24 pixels (the largest of them: 20 x 20)"
    )


def test_a_good_folder_warns_of_nothing(few, caplog):
    crops(few)
    assert not caplog.records


@pytest.mark.parametrize("make", [crops, check_source])
def test_a_missing_folder_is_named_with_the_way_out(make, tmp_path):
    missing = str(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"data\.source .*nowhere.* does not exist: .*'photos'"):
        make(missing)


def test_a_folder_without_images_is_named_with_the_way_out(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ConfigError, match=r"data\.source .* holds no readable image: .*'photos'"):
        check_source(str(tmp_path))
    with pytest.raises(ConfigError, match=r"data\.source .* holds no image"):
        crops(tmp_path)


def test_crops_larger_than_the_images_name_the_size(few):
    with pytest.raises(ConfigError, match=r"data\.image_size 64: lower it"):
        crops(few, size=64)


def test_only_damaged_images_are_an_error(tmp_path):
    column_image().save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match="holds no image that is readable"):
        crops(tmp_path)


def test_sources_with_an_image_pass_the_check(few):
    check_source("photos")
    check_source(str(few))


def lazy(source, count=50, held_out=20, **options):
    """The same crops, of which none are kept in memory."""
    return image_crops(
        str(source), size=SIZE, crops=count, held_out_crops=held_out, seed=0, memory=0, **options
    )


@pytest.mark.parametrize("shorter_side", [0, 16])
@pytest.mark.parametrize("folder", ["few", "many"])
def test_a_set_too_large_for_memory_has_the_same_crops(folder, shorter_side, request):
    source = request.getfixturevalue(folder)
    eager = image_crops(
        str(source), size=4, crops=50, held_out_crops=20, seed=0, shorter_side=shorter_side
    )
    late = image_crops(
        str(source),
        size=4,
        crops=50,
        held_out_crops=20,
        seed=0,
        shorter_side=shorter_side,
        memory=0,
    )
    for a, b in zip(eager, late, strict=True):
        assert isinstance(a, ImageCrops)
        assert isinstance(b, LazyCrops)
        assert len(a) == len(b)
        indices = np.random.default_rng(0).permutation(len(a))
        torch.testing.assert_close(b.batch(indices), a.batch(indices), rtol=0, atol=0)


def test_crops_are_kept_up_to_the_given_memory(many):
    crop = 3 * SIZE * SIZE
    train, _ = image_crops(
        str(many), size=SIZE, crops=50, held_out_crops=20, seed=0, memory=30 * crop
    )
    assert isinstance(train, LazyCrops)
    first = train.batch(np.arange(50))
    assert sum(pixels.nbytes for pixels in train.kept.values()) == 30 * crop
    torch.testing.assert_close(train.batch(np.arange(50)), first, rtol=0, atol=0)
    assert all(pixels.base is None for pixels in train.kept.values())  # the rest is let go


def test_an_image_found_damaged_late_is_replaced_and_named_once(many, caplog):
    train, _ = lazy(many)
    assert isinstance(train, LazyCrops)
    broken = train.parts[3].picture
    assert isinstance(broken, FilePicture)
    content = broken.path.read_bytes()
    broken.path.write_bytes(content[: len(content) // 2])
    with caplog.at_level(logging.WARNING):
        first, again = train.batch(np.arange(50)), train.batch(np.arange(50))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    (record,) = caplog.records
    assert record.getMessage() == f"skipped damaged image 1: {broken.name}"
    number = int(np.flatnonzero(train.part_of == 3)[0])
    after = int(np.flatnonzero(train.part_of == 4)[0])
    torch.testing.assert_close(first[number], first[after], rtol=0, atol=0)


def test_digests_tell_sets_apart(many):
    assert lazy(many)[0].digest() == lazy(many)[0].digest()
    assert lazy(many)[0].digest() != lazy(many)[1].digest()
    assert crops(many)[0].digest() != crops(many, seed=1)[0].digest()


def test_held_out_crops_come_from_a_source_of_their_own(many):
    other = many.parent / "other"
    other.mkdir()
    column_image().save(other / "a.png")
    train, held_out = crops(many, 200, 400, held_out_source=str(other))
    assert train.images.unique().tolist() == list(range(40))
    assert set(held_out.images[:, 0].unique().tolist()) == set(range(100))


def test_images_are_resized_to_their_shorter_side(tmp_path):
    # a quarter as wide and high: 4 x 4 pixels become one
    column_image(width=200, height=80).save(tmp_path / "a.png")
    train, held_out = crops(tmp_path, 300, 100, 4, shorter_side=20)
    # 164 columns of the left part and 36 of the right, with 1.5 as the mean of columns 0 to 3
    left, right = train.images[:, 0].unique(), held_out.images[:, 0].unique()
    assert left[0] <= 2
    assert left[-1] < 164 <= right[0]
    steps = train.images[:, 0].int().diff(dim=2)
    assert set(steps.unique().tolist()) <= {3, 4, 5}


def image_folder(folder, count=40):
    """A folder of images, as `datasets` reads it."""
    folder.mkdir()
    for i in range(count):
        plain_image(i).save(folder / f"{i:02}.png")
    return folder


@pytest.mark.parametrize("word", ["hf", "hf-stream"])
@pytest.mark.parametrize("form", ["imagefolder", "parquet"])
def test_data_sets_of_the_hub_are_read_by_name(word, form, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    folder = image_folder(tmp_path / "images")
    if form == "parquet":
        rows = datasets.load_dataset(str(folder), split="train")
        folder = tmp_path / "parquet"
        folder.mkdir()
        rows.to_parquet(str(folder / "train.parquet"))
    source = f"{word}:{folder}:train"
    check_source(source)
    train, held_out = crops(source, 160, 40)
    seen, unseen = train.images.unique().tolist(), held_out.images.unique().tolist()
    assert sorted(seen + unseen) == list(range(40))
    late, _ = lazy(source, 160, 40)
    torch.testing.assert_close(late.batch(np.arange(160)), train.batch(np.arange(160)))


def test_a_stream_gives_no_more_rows_than_crops(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = image_folder(tmp_path / "images")
    train, held_out = crops(f"hf-stream:{folder}", 20, 5)
    values = {*train.images.unique().tolist(), *held_out.images.unique().tolist()}
    assert max(values) < 25


def test_a_data_set_without_images_is_named_with_the_way_out(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "texts").mkdir()
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(
        str(tmp_path / "texts" / "train.parquet")
    )
    with pytest.raises(ConfigError, match=r"has no image column among text: .*'photos'"):
        crops(f"hf:{tmp_path / 'texts'}")
    with pytest.raises(ConfigError, match=r"data\.source 'hf:.*nowhere' can't be loaded \("):
        crops(f"hf:{tmp_path / 'nowhere'}")
    with pytest.raises(ConfigError, match=r"data\.source 'hf:' holds no readable image"):
        check_source("hf:")


@pytest.mark.parametrize("word", ["hf", "hf-stream"])
@pytest.mark.parametrize("form", ["imagefolder", "parquet"])
def test_broken_rows_of_a_data_set_are_counted_named_and_skipped(
    word, form, tmp_path, monkeypatch, caplog
):
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    folder = image_folder(tmp_path / "images")
    # one without a header, and one whose pixels break off
    (folder / "05.png").write_bytes(b"no image")
    noise = np.random.default_rng(0).integers(256, size=(20, 20, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "07.png")
    (folder / "07.png").write_bytes((folder / "07.png").read_bytes()[:200])
    if form == "parquet":
        rows = datasets.load_dataset(str(folder), split="train")
        folder = tmp_path / "parquet"
        folder.mkdir()
        rows.cast_column("image", datasets.Image(decode=False)).to_parquet(
            str(folder / "train.parquet")
        )
    source = f"{word}:{folder}"
    with caplog.at_level(logging.WARNING):
        train, held_out = crops(source, 160, 40)
    assert [record.getMessage() for record in caplog.records] == [
        f"{source}: skipped 2 unreadable images: row 5, row 7"
    ]
    values = {*train.images.unique().tolist(), *held_out.images.unique().tolist()}
    assert values == set(range(40)) - {5, 7}
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        late = lazy(source, 160, 40)
        batches = [part.batch(np.arange(len(part))) for part in late]
    assert [part.shape[0] for part in batches] == [160, 40]
    said = [record.getMessage() for record in caplog.records]
    assert "row 5" in said[0]
    assert said[1:] == ["skipped damaged image 1: row 7"]


def test_a_rows_image_may_lie_in_an_archive(tmp_path):
    import zipfile

    plain_image(7).save(tmp_path / "a.png")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.write(tmp_path / "a.png", "a.png")
    place = f"zip://a.png::{tmp_path / 'all.zip'}"
    row = RowPicture([{"image": {"bytes": None, "path": place}}], "image", 0)
    assert np.asarray(Image.open(row.stream())).tolist() == np.asarray(plain_image(7)).tolist()


def test_a_stream_that_breaks_off_is_named_with_the_way_out(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    rows = datasets.load_dataset(str(image_folder(tmp_path / "images")), split="train")
    (tmp_path / "rows").mkdir()
    file = tmp_path / "rows" / "train.parquet"
    rows.to_parquet(str(file))
    content = bytearray(file.read_bytes())
    # the footer, which says what there is, stays whole
    content[4 : len(content) // 4] = bytes(len(content) // 4 - 4)
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"data\.source 'hf-stream:.*' can't be loaded \("):
        crops(f"hf-stream:{tmp_path / 'rows'}")


def numbered_images(folder, numbers, start=0):
    folder.mkdir(parents=True, exist_ok=True)
    for i, number in enumerate(numbers, start):
        plain_image(number).save(folder / f"{i:03}.png")
    return folder


def test_copies_of_an_image_lie_on_one_side(tmp_path):
    numbered_images(tmp_path, [i % 30 for i in range(90)])
    train, held_out = crops(tmp_path, 900, 200)
    seen, unseen = set(train.images.unique().tolist()), set(held_out.images.unique().tolist())
    assert seen | unseen == set(range(30))
    assert not seen & unseen
    assert unseen


def test_names_and_places_of_images_decide_no_side(many):
    _, before = crops(many, 200, 200)
    (many / "moved").mkdir()
    for i in range(40):
        (many / f"{i:02}.png").rename(many / "moved" / f"{97 * i % 40}.png")
    _, after = crops(many, 200, 200)
    assert after.images.unique().tolist() == before.images.unique().tolist()


def test_more_images_take_none_out_of_training(many):
    before = set(crops(many, 200, 200)[1].images.unique().tolist())
    numbered_images(many / "more", range(40, 120))
    train, held_out = crops(many, 900, 900)
    assert before <= set(held_out.images.unique().tolist())
    assert not before & set(train.images.unique().tolist())


def test_images_that_are_all_equal_are_used_with_a_warning(tmp_path, caplog):
    numbered_images(tmp_path, [7] * 25)
    with caplog.at_level(logging.WARNING):
        train, _ = crops(tmp_path, size=20)
    assert train.images.unique().tolist() == [7]
    (record,) = caplog.records
    assert "all 25 images are equal, and held-out crops are of what training sees" in (
        record.getMessage()
    )


def test_a_few_different_images_among_many_copies_are_split_by_content(tmp_path):
    numbered_images(tmp_path, [i % 3 for i in range(30)])
    train, held_out = crops(tmp_path, size=20)
    assert not set(train.images.unique().tolist()) & set(held_out.images.unique().tolist())


@pytest.mark.parametrize(
    ("way", "memory"),
    [("inside", 2**30), ("inside", 0), ("around", 0), ("link", 0), ("copies", 0), ("hub", 2**30)],
)
def test_held_out_images_are_kept_out_of_training(way, memory, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "data"
    train_folder = numbered_images(root / "train", range(30))
    val = numbered_images(root / "val", range(30, 50))
    source, held_out_source = root, val
    if way == "around":
        source, held_out_source = train_folder, tmp_path / "outer"
        numbered_images(held_out_source, range(20))
    elif way == "link":
        held_out_source = tmp_path / "link"
        held_out_source.symlink_to(val)
    elif way == "copies":
        held_out_source = numbered_images(tmp_path / "copies", range(30, 50), start=500)
    elif way == "hub":
        held_out_source = f"hf:{val}"
    sets = image_crops(
        str(source),
        size=SIZE,
        crops=150,
        held_out_crops=60,
        seed=0,
        held_out_source=str(held_out_source),
        memory=memory,
    )
    seen, unseen = (
        set(((part.batch(np.arange(len(part))) + 1) * 127.5).round().int().unique().tolist())
        for part in sets
    )
    assert unseen == (set(range(20)) if way == "around" else set(range(30, 50)))
    assert seen == (set(range(20, 30)) if way == "around" else set(range(30)))


def test_a_held_out_source_that_leaves_nothing_to_train_on_is_refused(many):
    with pytest.raises(ConfigError, match=r"data\.held_out_source .* holds every image of data"):
        crops(many, held_out_source=str(many))


def test_a_digest_of_crops_to_come_is_that_of_contents(many):
    before = lazy(many)[0].digest()
    (many / "00.png").rename(many / "00_again.png")  # stays the first
    assert lazy(many)[0].digest() == before
    plain_image(200).save(many / "00_again.png")
    assert lazy(many)[0].digest() != before


def test_names_that_are_not_utf8_are_usable_and_shown_escaped(tmp_path, caplog):
    for i in range(30):
        plain_image(i).save(tmp_path / "a.png")
        os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/caf\xe9_%d.png" % i)
    with open(os.fsencode(tmp_path) + b"/\xe9\x1b[2J.png", "wb") as file:
        file.write(b"no image")
    for read in (crops, lazy):
        with caplog.at_level(logging.WARNING):
            train, held_out = read(tmp_path)
        train.batch(np.arange(50))
        assert train.digest() != held_out.digest()
    assert all(record.getMessage().isascii() for record in caplog.records)
    assert "\\udce9\\x1b[2J.png" in caplog.records[0].getMessage()


def test_images_of_too_many_pixels_are_skipped_by_name(many, caplog, monkeypatch):
    monkeypatch.setattr("simvq_moe.data.media.pixels.MOST_PIXELS", 1_000)
    monkeypatch.setattr("simvq_moe.data.images.MOST_PIXELS", 1_000)
    column_image().save(many / "large.png")
    with caplog.at_level(logging.WARNING):
        crops(many)
    (record,) = caplog.records
    assert record.getMessage().endswith("skipped 1 images of more than 1,000 pixels: large.png")
    # and none is resized to more
    with pytest.raises(ConfigError, match="holds no image"):
        crops(many, shorter_side=40)


def test_only_damaged_images_are_an_error_batch_by_batch(tmp_path):
    column_image().save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    train, _ = lazy(tmp_path)
    with pytest.raises(ConfigError, match=r"all 1 images are damaged, such as .*a\.png"):
        train.batch(np.arange(2))


def test_an_image_that_cannot_be_read_now_ends_the_run_with_a_line(many):
    train, _ = lazy(many)
    assert isinstance(train, LazyCrops)
    picture = train.parts[3].picture
    assert isinstance(picture, FilePicture)
    picture.path.unlink()
    with pytest.raises(ConfigError, match=rf"{picture.name} does not exist"):
        train.batch(np.arange(50))


def test_images_behind_links_are_found_once(tmp_path):
    real = numbered_images(tmp_path / "elsewhere", range(20, 30))
    source = numbered_images(tmp_path / "source", range(20))
    (source / "linked").symlink_to(real)
    (source / "loop").symlink_to(source)
    names = [picture.name for picture in files(str(source))]
    assert names == [f"{i:03}.png" for i in range(20)] + [f"linked/{i:03}.png" for i in range(10)]


def test_a_folder_that_cannot_be_read_now_is_named(many, monkeypatch):
    (many / "deep").mkdir()
    scandir = os.scandir

    def fail(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr("os.scandir", fail)
    with pytest.raises(ConfigError, match=r"deep can't be read now: Permission denied"):
        crops(many)


def test_encoded_images_of_a_stream_are_on_disk_and_not_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    rows = ({"image": {"bytes": bytes([i]) * 10**5, "path": "x"}} for i in range(1, 100))
    tracemalloc.start()
    try:
        spooled = Spooled(
            itertools.chain(rows, [{"image": {"path": "y"}}, {"image": None}]), "image"
        )
        assert tracemalloc.get_traced_memory()[1] < 2e6
    finally:
        tracemalloc.stop()
    assert len(spooled) == 101
    assert spooled[41]["image"] == {"bytes": bytes([42]) * 10**5}
    assert [spooled[i]["image"] for i in (99, 100)] == [{"path": "y"}, {"path": None}]
    assert not list(tmp_path.iterdir())  # nothing is left for a killed process to leave


def saved(folder, values):
    """Images of these greys, as `datasets` saves a split of them."""
    import datasets

    folder.mkdir()
    for value in values:
        plain_image(value).save(folder / f"{value:03}.png")
    files = [str(file) for file in sorted(folder.glob("*.png"))]
    features = datasets.Features({"picture": datasets.Image(), "n": datasets.Value("int64")})
    rows = {"picture": files, "n": list(range(len(files)))}
    return datasets.Dataset.from_dict(rows, features=features)


def greys(part):
    brightest = part.batch(np.arange(len(part))).amax((1, 2, 3))
    return {round(float(value)) for value in (brightest + 1) * 127.5}


def test_a_saved_data_set_gives_its_images_and_its_own_splits(tmp_path):
    import datasets

    datasets.disable_progress_bars()
    train, test = saved(tmp_path / "a", range(40)), saved(tmp_path / "b", range(38, 60))
    datasets.DatasetDict({"test": test, "train": train}).save_to_disk(tmp_path / "set")
    one, other = crops(tmp_path / "set", 80, 44)
    assert greys(other) == set(range(38, 60))
    assert greys(one) == set(range(38)), "copies of held-out images are not trained on"
    check_source(str(tmp_path / "set"))
    whole, _ = crops(tmp_path / "set" / "train", 80, 20)
    assert greys(whole) < set(range(40))


def test_a_saved_data_set_of_a_stranger_is_refused_in_a_line(tmp_path):
    import datasets

    datasets.disable_progress_bars()
    rows = saved(tmp_path / "a", range(30))
    rows.remove_columns("picture").save_to_disk(tmp_path / "none")
    with pytest.raises(ConfigError, match="no image column among n"):
        crops(tmp_path / "none")
    rows.save_to_disk(tmp_path / "set")
    (shard,) = (tmp_path / "set").glob("data-*.arrow")
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(ConfigError, match=r"can't be loaded \(\w+: [^\n]*$"):
        crops(tmp_path / "set")


def test_a_path_in_a_saved_data_set_of_a_stranger_is_not_followed(tmp_path):
    plain_image(1).save(tmp_path / "secret.png")
    row = {"image": {"bytes": None, "path": str(tmp_path / "secret.png")}}
    picture = RowPicture(Embedded([row], "image"), "image", 0)
    with pytest.raises(NoPictureError):
        picture.stream()
