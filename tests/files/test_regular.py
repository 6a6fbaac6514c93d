"""Anybody's files are read whole or refused in one line; ours are written whole or not at all."""

from __future__ import annotations

import errno
import os
import zipfile
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from pydantic import BaseModel

from simvq_moe.files.arrays import Layout, read_array, read_arrays
from simvq_moe.files.regular import (
    BrokenFileError,
    MissingFileError,
    parse_json,
    printable,
    read_bytes,
    read_json,
    read_text,
    write_atomically,
    written_whole,
)


class Point(BaseModel):
    x: int
    y: float = 0.0


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("fifo", ".", "loop"):
        with pytest.raises(BrokenFileError):
            read_bytes(tmp_path / name)
    with pytest.raises(BrokenFileError):
        read_bytes(Path("/dev/zero"))
    with pytest.raises(MissingFileError):
        read_bytes(tmp_path / "nothing")


def test_links_are_followed_only_inside(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.write_text("secret")
    (inside / "own").write_text("own")
    (inside / "good").symlink_to("own")
    (inside / "bad").symlink_to(outside)
    assert read_text(inside / "good", inside=inside) == "own"
    assert read_text(inside / "bad") == "secret"
    with pytest.raises(BrokenFileError, match="link out of"):
        read_text(inside / "bad", inside=inside)


def test_size_and_encoding_are_checked(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc\xff")
    with pytest.raises(BrokenFileError, match="4 bytes: at most 3"):
        read_bytes(tmp_path / "a", limit=3)
    with pytest.raises(BrokenFileError, match="not UTF-8 text: byte 3"):
        read_text(tmp_path / "a")


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5000, "", '{"a":', "\x00", b"\xff"])
def test_what_is_no_json_is_one_line(text: str | bytes) -> None:
    with pytest.raises(BrokenFileError, match=r"^here is not readable JSON: ") as found:
        parse_json(text, "here")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"x": "1"}', "x '1'"),
        ('{"x": 1.5}', "x 1.5"),
        ('{"y": 1}', "x "),
        ("[1]", r"content \[1\]"),
        ('{"x": 1, "y": [2]}', r"y \[2\]"),
    ],
)
def test_a_json_file_of_another_schema_names_the_key(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(BrokenFileError, match=f"a.json has {named}"):
        read_json(tmp_path / "a.json", Point)


def test_a_json_file_of_the_schema_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"x": 3, "y": 4}')
    assert read_json(tmp_path / "a.json", Point) == Point(x=3, y=4.0)


def test_arrays_come_back_and_others_are_refused(tmp_path: Path) -> None:
    array = np.arange(6).reshape(2, 3)
    np.save(tmp_path / "a.npy", array)
    np.savez_compressed(tmp_path / "a.npz", a=array, b=np.array(["x"]))
    for mapped in (False, True):
        found = read_array(tmp_path / "a.npy", Layout("i", 2), mapped=mapped)
        np.testing.assert_array_equal(found, array)
    both = read_arrays(tmp_path / "a.npz", {"a": Layout("i", 2), "c": Layout("i", optional=True)})
    np.testing.assert_array_equal(both.pop("a"), array)
    assert not both
    assert set(read_arrays(tmp_path / "a.npz", {}, others=Layout("iU"))) == {"a", "b"}
    for layout in (Layout("f", 2), Layout("i", 1)):
        with pytest.raises(BrokenFileError, match="int64 of shape"):
            read_array(tmp_path / "a.npy", layout)
        with pytest.raises(BrokenFileError, match="int64 of shape"):
            read_arrays(tmp_path / "a.npz", {"a": layout})
    with pytest.raises(BrokenFileError, match="lacks the array c"):
        read_arrays(tmp_path / "a.npz", {"c": Layout("i")})


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    evil = np.array([{}], dtype=object)
    np.save(tmp_path / "a.npy", evil, allow_pickle=True)
    np.savez(tmp_path / "a.npz", a=evil)
    with pytest.raises(BrokenFileError, match="object"):
        read_array(tmp_path / "a.npy", Layout("i"))
    with pytest.raises(BrokenFileError, match="object"):
        read_arrays(tmp_path / "a.npz", {"a": Layout("i")})


def test_an_archive_that_unpacks_to_more_than_the_limit_is_not_unpacked(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", a=np.zeros(2**20), b=np.zeros(2**20))
    layouts = {"a": Layout("f"), "b": Layout("f")}
    with pytest.raises(BrokenFileError, match="more than"):
        read_arrays(tmp_path / "a.npz", layouts, limit=12 * 2**20)
    assert len(read_arrays(tmp_path / "a.npz", layouts, limit=16 * 2**20)) == 2


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_cut_and_changed_arrays_are_one_line(tmp_path: Path, suffix: str) -> None:
    buffer = BytesIO()
    if suffix == "npy":
        np.save(buffer, np.arange(100))
    else:
        np.savez_compressed(buffer, a=np.arange(100))
    whole = buffer.getvalue()
    rng = np.random.default_rng(0)
    path = tmp_path / f"a.{suffix}"
    for _ in range(300):
        content = bytearray(whole[: rng.integers(len(whole))] if rng.random() < 0.3 else whole)
        for place in rng.integers(len(content), size=3) if content else ():
            content[place] = rng.integers(256)
        path.write_bytes(content)
        with suppress(BrokenFileError):  # and nothing else
            if suffix == "npy":
                read_array(path, Layout("i"))
            else:
                read_arrays(path, {"a": Layout("i")}, limit=2**20)


def test_an_array_larger_than_its_file_takes_no_memory(tmp_path: Path) -> None:
    buffer = BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": "<i8", "fortran_order": False, "shape": (10**15,)}
    )
    (tmp_path / "a.npy").write_bytes(buffer.getvalue())
    with pytest.raises(BrokenFileError):
        read_array(tmp_path / "a.npy", Layout("i"), limit=2**60)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", buffer.getvalue())
    with pytest.raises(BrokenFileError):
        read_arrays(tmp_path / "a.npz", {"a": Layout("i")})


def test_a_terminal_obeys_nothing_that_is_printed() -> None:
    assert printable("x\x1b[2J\n\u202e\udcff") == r"x\x1b[2J\n\u202e\udcff"
    assert printable("Größe: 3 µs, 模型") == "Größe: 3 µs, 模型"


def test_a_file_is_replaced_whole_with_the_permissions_of_umask(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    before = os.umask(0o027)
    try:
        write_atomically(path, "first")
        with written_whole(path) as aside:
            assert path.read_text() == "first"
            aside.unlink()
            aside.touch(0o600)
            np.savez(aside, a=np.arange(3))
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
    assert read_arrays(path, {"a": Layout("i")})["a"].tolist() == [0, 1, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_atomically(path, "first")

    def fail() -> None:
        with written_whole(path) as aside:
            aside.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert path.read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError("8 requested and 5 written"), "is not written whole: 8 requested and 5 written"),
    ],
)
def test_what_kept_a_file_from_being_written_names_it(
    raised: OSError, words: str, tmp_path: Path
) -> None:
    with pytest.raises(OSError, match=words) as found, written_whole(tmp_path / "rows.npy"):
        raise raised
    assert found.value.filename == str(tmp_path / "rows.npy")
    assert found.value.errno in (errno.ENOSPC, errno.EIO)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["chmod", "fsync"])
def test_a_mount_without_permissions_or_fsync_takes_files(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, call, refused)
    with written_whole(tmp_path / "a") as aside:
        aside.unlink()
        aside.touch(0o600)
        aside.write_text("new")
    assert (tmp_path / "a").read_text() == "new"


def test_an_fsync_that_lost_data_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", lost)
    with pytest.raises(OSError, match="Input/output"):
        write_atomically(tmp_path / "a", "new")
    assert list(tmp_path.iterdir()) == []


def test_a_link_in_the_place_of_the_temporary_file_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("private")
    (tmp_path / ".tmp-a").symlink_to(tmp_path / "victim")
    write_atomically(tmp_path / "a", "new")
    assert (tmp_path / "victim").read_text() == "private"
    assert (tmp_path / "a").read_text() == "new"
