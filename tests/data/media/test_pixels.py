"""Pictures of anybody become upright 8-bit RGB, or nothing, in bounded memory."""

import errno
import struct
import threading
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageOps, features

from simvq_moe.data.media import pixels as module
from simvq_moe.data.media.pictures import FilePicture, RowPicture
from simvq_moe.data.media.pixels import Cut, Header, PixelBudget, header, rgb
from simvq_moe.files.regular import BrokenFileError

ORIENTATION = 0x0112
RAMP = np.tile(np.linspace(0, 1, 256), (16, 1))


def whole(width, height):
    return Cut(0, width, width, height)


def picture_of(path):
    return FilePicture(path, path.name)


def saved(folder, name, pixels, **options):
    path = folder / name
    Image.fromarray(pixels).save(path, **options)
    return picture_of(path)


def read(picture):
    found = rgb(picture, whole)
    assert found is not None
    return found


def chunk(kind, content):
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def bomb(path, width, height):
    """A PNG of few bytes and many pixels."""
    rows = zlib.compress(b"\0" * (width // 8 + 1) * 10)
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )
    return picture_of(path)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["png", "jpg", "tiff", "webp"])
def test_pictures_are_read_upright(form, orientation, tmp_path):
    if form == "webp" and not features.check("webp"):
        pytest.skip("Pillow was built without WebP")
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    values = np.random.default_rng(0).integers(256, size=(3, 4, 3), dtype=np.uint8)
    pixels = values.repeat(8, 0).repeat(8, 1)
    picture = saved(tmp_path, f"a.{form}", pixels, exif=exif)
    with Image.open(picture.path) as image:
        upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    np.testing.assert_array_equal(read(picture), upright)
    known = header(picture)
    assert isinstance(known, Header)
    assert (known.height, known.width) == upright.shape[:2]
    assert (known.width < known.height) == (orientation >= 5)


def test_an_orientation_that_stands_after_the_pixels_counts(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    pixels = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3)
    picture = saved(tmp_path, "a.png", pixels)
    content = picture.path.read_bytes()
    late = chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    picture.path.write_bytes(content[:-12] + late + content[-12:])
    np.testing.assert_array_equal(read(picture), np.rot90(pixels, -1))


def test_a_broken_orientation_leaves_whole_pixels(tmp_path):
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    np.testing.assert_array_equal(
        read(saved(tmp_path, "a.png", pixels, exif=b"Exif\0\0no")), pixels
    )


@pytest.mark.parametrize("form", ["png", "tif"])
def test_16_bits_keep_their_greys(form, tmp_path):
    picture = saved(tmp_path, f"a.{form}", (RAMP * 65535).astype(np.uint16))
    expected = (RAMP * 65535).astype(np.uint16) >> 8
    np.testing.assert_array_equal(read(picture), expected[..., None].repeat(3, 2))


def test_32_bit_integers_are_16_bit_greys_or_left_out(tmp_path):
    greys = (RAMP * 65535).astype(np.int32)
    np.testing.assert_array_equal(read(saved(tmp_path, "a.tif", greys))[..., 0], greys >> 8)
    for beyond in (65_536, -1):
        greys[0, 0] = beyond
        assert rgb(saved(tmp_path, "a.tif", greys), whole) is None


def test_floats_are_greys_from_0_to_1_or_left_out(tmp_path):
    found = read(saved(tmp_path, "a.tif", RAMP.astype(np.float32)))
    np.testing.assert_array_equal(found[..., 0], np.arange(256)[None].repeat(16, 0))
    for beyond in (1.5, -0.5, float("nan")):
        greys = RAMP.astype(np.float32)
        greys[0, 0] = beyond
        assert rgb(saved(tmp_path, "a.tif", greys), whole) is None


def test_a_tiff_of_12_bits_is_as_bright_as_it_says():
    image = Image.fromarray(np.full((2, 2), 0x0ABC, np.uint16))
    image.tag_v2 = {258: (12,)}  # pyright: ignore[reportAttributeAccessIssue]
    assert np.asarray(module.eight_bits(image)).tolist() == [[0xAB] * 2] * 2


def test_transparent_colours_of_a_palette_are_dropped(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(tmp_path / "a.png", transparency=bytes([0, 128]))
    assert read(picture_of(tmp_path / "a.png")).tolist() == [[[10, 20, 30]] * 4] * 4


def test_no_pixel_beside_a_cut_takes_part_in_its_resizing(tmp_path):
    pixels = np.zeros((80, 200, 3), np.uint8)
    pixels[:, 160:] = 255
    picture = saved(tmp_path, "a.png", pixels)
    left, right = (
        rgb(picture, lambda *_, at=at: Cut(*at)) for at in ((0, 160, 40, 20), (160, 200, 10, 20))
    )
    assert left is not None
    assert right is not None
    assert (left.shape, right.shape) == ((20, 40, 3), (20, 10, 3))
    assert (left.max(), right.min()) == (0, 255)


@pytest.mark.parametrize(("width", "height"), [(9_000, 9_943), (13_000, 13_000), (60_000, 60_000)])
def test_a_picture_of_too_many_pixels_is_not_decoded(width, height, tmp_path, monkeypatch):
    picture = bomb(tmp_path / "a.png", width, height)
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("decoded"))
    assert header(picture) == "too large"
    assert rgb(picture, whole) is None


def test_a_picture_is_not_resized_to_too_many_pixels(tmp_path):
    picture = saved(tmp_path, "a.png", np.zeros((1, 1_000, 3), np.uint8))
    assert rgb(picture, lambda w, h: Cut(0, w, w * 300, h * 300)) is None


def test_a_file_of_too_many_bytes_is_not_opened(tmp_path, monkeypatch):
    picture = saved(tmp_path, "a.png", np.zeros((9, 9, 3), np.uint8))
    row = RowPicture([{"image": {"bytes": picture.path.read_bytes()}}], "image", 0)
    monkeypatch.setattr("simvq_moe.data.media.pictures.MOST_BYTES", 20)
    assert header(picture) == header(row) == "too large"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError,
        NotImplementedError,
        KeyError,
        struct.error,
        zlib.error,
        EOFError,
        ZeroDivisionError,
        SyntaxError,
        OSError,
        AssertionError,
        MemoryError,
    ],
)
def test_whatever_a_decoder_raises_is_damage(error, tmp_path, monkeypatch):
    picture = saved(tmp_path, "a.png", np.zeros((9, 9, 3), np.uint8))

    def fail(_):
        raise error("damaged")

    monkeypatch.setattr(Image.Image, "load", fail)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    assert rgb(picture, whole) is None


def test_a_program_that_draws_is_no_picture(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.eps")
    assert header(picture_of(tmp_path / "a.eps")) == "unreadable"


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE])
@pytest.mark.parametrize("read", [header, lambda picture: rgb(picture, whole)])
def test_a_file_that_cannot_be_read_now_is_no_damage(number, read, tmp_path, monkeypatch):
    picture = saved(tmp_path, "a.png", np.zeros((9, 9, 3), np.uint8))

    class Failing(BytesIO):
        def read(self, *_):
            raise OSError(number, "Input/output error")

    monkeypatch.setattr(FilePicture, "stream", lambda _: Failing())
    with pytest.raises(BrokenFileError, match=r"a\.png can't be read now: Input/output error: "):
        read(picture)


def test_threads_hold_no_more_pixels_than_the_budget():
    budget, most, held = PixelBudget(100), [], []

    def work(pixels):
        with budget.hold(pixels):
            held.append(pixels)
            most.append(sum(held))
            held.remove(pixels)

    threads = [threading.Thread(target=work, args=(n,)) for n in (30, 60, 100, 1, 99, 50) * 20]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert max(most) <= 100
    assert budget.free == 100


def test_one_that_wants_more_than_the_budget_gets_all_of_it():
    budget = PixelBudget(10)
    with budget.hold(11):
        assert budget.free == 0
    assert budget.free == 10


def test_a_row_whose_image_is_gone_holds_none_and_one_out_of_reach_is_an_error(monkeypatch):
    row = RowPicture([{"image": {"bytes": None, "path": "memory://nowhere.png"}}], "image", 0)
    assert header(row) == "unreadable"
    assert header(RowPicture([{"image": None}], "image", 0)) == "unreadable"

    def fail(*_):
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr("fsspec.core.url_to_fs", fail)
    with pytest.raises(BrokenFileError, match=r"row 0, can't be read now: .*reset by peer"):
        header(row)
