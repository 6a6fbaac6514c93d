"""Token shards: rows of codes on disk, and the sequences that a language model sees of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from simvq_moe.data.codes import (
    CodeSequences,
    Manifest,
    TokenizerReference,
    entropy_bits,
    is_codes,
    open_codes,
    read_manifest,
    seal,
    write_manifest,
    write_shard,
)
from simvq_moe.errors import ConfigError


def manifest(levels: int, codes: int = 7) -> Manifest:
    return Manifest(
        tokenizer=TokenizerReference("../run", "abc", {"task": "image_tokenizer"}),
        source="photos",
        data_digest="d",
        codes=codes,
        grid=(2, 3),
        levels=levels,
        sample_shape=(3, 8, 12),
        sample_rate=0,
        samples={"train": 10, "held_out": 3},
        shard_samples=4,
    )


def write(folder: Path, levels: int) -> dict[str, np.ndarray]:
    """A finished folder of random codes."""
    of = manifest(levels)
    rng = np.random.default_rng(0)
    folder.mkdir()
    rows, shards = {}, {}
    for part, samples in of.samples.items():
        rows[part] = rng.integers(of.codes, size=(samples, *of.row_shape)).astype(of.dtype)
        sealed = []
        for i, first in enumerate(range(0, samples, of.shard_samples)):
            path = folder / f"{part}_{i:05d}.npy"
            write_shard(path, rows[part][first : first + of.shard_samples])
            sealed.append(seal(path))
        shards[part] = tuple(sealed)
    write_manifest(folder, replace(of, shards=shards))
    return rows


@pytest.mark.parametrize("levels", [1, 2])
def test_rows_are_read_from_whatever_shard_they_are_in(levels: int, tmp_path: Path) -> None:
    rows = write(tmp_path / "codes", levels)
    parts = open_codes(tmp_path / "codes")
    assert [len(parts[part]) for part in ("train", "held_out")] == [10, 3]
    assert all(isinstance(shard, np.memmap) for shard in parts["train"].shards)
    indices = np.array([9, 0, 4, 3, 9])
    np.testing.assert_array_equal(parts["train"].rows(indices), rows["train"][indices])
    counts = np.stack(
        [np.bincount(column, minlength=7) for column in rows["train"].reshape(-1, levels).T]
    )
    np.testing.assert_array_equal(parts["train"].counts(), counts)
    assert read_manifest(tmp_path / "codes") == parts["train"].manifest


@pytest.mark.parametrize("levels", [1, 3])
def test_a_sequence_begins_with_its_own_token_and_holds_levels_in_their_ranges(levels: int) -> None:
    of = manifest(levels)
    rows = np.arange(2 * of.context).reshape(2, *of.row_shape) % of.codes
    sequences = of.sequences(rows.astype(of.dtype))
    assert sequences.shape == (2, of.context + 1)
    assert of.vocabulary == 7 * levels + 1
    assert (sequences[:, 0] == of.vocabulary - 1).all()
    for i in range(of.context):
        allowed = of.ranges[i % levels]
        token, level = divmod(i, levels)
        code = rows.reshape(2, of.tokens, levels)[:, token, level]
        np.testing.assert_array_equal(sequences[:, 1 + i], code + allowed.start)
        assert int(sequences[:, 1 + i].max()) in allowed
    ids = of.ids(sequences)
    assert ids.shape == (2, 2, 3, *([levels] if levels > 1 else []))
    assert_close(ids.reshape(2, -1), torch.from_numpy(rows).reshape(2, -1), rtol=0, atol=0)


def test_large_codebooks_take_wider_integers() -> None:
    assert manifest(1, codes=1 << 16).dtype == np.uint16
    assert manifest(1, codes=(1 << 16) + 1).dtype == np.uint32


def test_the_entropy_of_codes_is_a_mean_over_levels() -> None:
    counts = np.array([[5, 5, 5, 5], [8, 0, 0, 0]])
    assert_close(entropy_bits(counts), (2.0 + 0.0) / 2)
    assert_close(entropy_bits(np.array([[3, 1]])), 2 - 0.75 * np.log2(3).item())


def test_what_is_no_finished_folder_of_codes_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "codes"
    assert not is_codes(folder)
    write(folder, levels=1)
    assert is_codes(folder)
    (folder / "train_00001.npy").rename(folder / "kept")
    with pytest.raises(ConfigError, match=r"train_00001\.npy is missing"):
        open_codes(folder)
    write_shard(folder / "train_00001.npy", np.zeros((4, 5), dtype=np.uint16))
    with pytest.raises(ConfigError, match=r"not uint16 of shape \(4, 6\)"):
        open_codes(folder)
    write_manifest(folder, manifest(1))
    with pytest.raises(ConfigError, match="not encoded to its end"):
        open_codes(folder)
    (folder / "manifest.json").write_text('{"vocabulary": 300}')
    assert not is_codes(folder)
    with pytest.raises(ConfigError, match=r"holds no manifest\.json of token shards"):
        read_manifest(folder)


def test_a_shard_that_is_cut_off_is_no_shard(tmp_path: Path) -> None:
    path = tmp_path / "train_00000.npy"
    write_shard(path, np.zeros((4, 6), dtype=np.uint16))
    assert seal(path) is not None
    path.write_bytes(path.read_bytes()[:-1])
    assert seal(path) is None
    assert seal(tmp_path / "nothing.npy") is None


def test_sequences_have_no_domains(tmp_path: Path) -> None:
    write(tmp_path / "codes", levels=1)
    held_out = open_codes(tmp_path / "codes")["held_out"]
    assert isinstance(held_out, CodeSequences)
    assert held_out.domains_of(np.arange(2)) is None


Change = Callable[[dict[str, Any]], Any]
FIRST = "train_00000.npy"


def shard(content: dict[str, Any], **change: Any) -> None:
    content["shards"]["train"][0] |= change


CONTENTS: dict[str, Change] = {
    "a file outside": lambda c: shard(c, file="../other/train_00000.npy"),
    "an absolute file": lambda c: shard(c, file="/etc/passwd"),
    "the folder itself": lambda c: shard(c, file=".."),
    "a name with a null byte": lambda c: shard(c, file="a\0b"),
    "samples in quotes": lambda c: shard(c, samples="4"),
    "negative samples": lambda c: shard(c, samples=-4),
    "other samples": lambda c: shard(c, samples=5),
    "codes in quotes": lambda c: c.update(codes="7"),
    "no codes": lambda c: c.pop("codes"),
    "codes of nothing": lambda c: c.update(codes=0),
    "huge codes": lambda c: c.update(codes=10**30),
    "many levels": lambda c: c.update(levels=2**30, codes=2**30),
    "no grid": lambda c: c.update(grid=[]),
    "a grid of nothing": lambda c: c.update(grid=[0, 3]),
    "a huge grid": lambda c: c.update(grid=[2**30, 2**30]),
    "grid of another type": lambda c: c.update(grid=6),
    "a part that is none": lambda c: c["samples"].update(test=3),
    "a part that is missing": lambda c: c["shards"].pop("held_out"),
    "no tokenizer": lambda c: c.update(tokenizer=None),
    "tokenizer of another type": lambda c: c["tokenizer"].update(run=5),
    "infinite rate": lambda c: c.update(sample_rate=float("inf")),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_a_manifest_that_can_not_be_true_is_named(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "codes"
    write(folder, levels=1)
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    CONTENTS[name](content)
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"manifest\.json has ") as caught:
        open_codes(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"[" * 10**5, b"\xff", b"null", b'{"format": 3}', b'{"format": "\xed\xa0\x80"}'],
)
def test_another_file_is_no_manifest_of_codes(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    assert not is_codes(tmp_path)
    with pytest.raises(ConfigError, match=r"holds no manifest\.json of token shards"):
        read_manifest(tmp_path)
    for source in ("a\0b", "n" * 5_000):
        assert not is_codes(source)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.full((4, 6), 7, np.uint16), "has id 7, beyond the vocabulary of 7"),
        (np.zeros((4, 6), np.int16), "holds int16"),
        (np.zeros((4, 6), np.float32), "holds float32"),
        (np.array([[{}] * 6] * 4, dtype=object), "no array|object"),
    ],
)
def test_a_shard_of_other_content_is_named(rows: np.ndarray, message: str, tmp_path: Path) -> None:
    write(tmp_path / "codes", levels=1)
    np.save(tmp_path / "codes" / FIRST, rows, allow_pickle=True)
    with pytest.raises(ConfigError, match=rf"{FIRST} .*({message})"):
        open_codes(tmp_path / "codes")


def test_nothing_is_left_beside_what_is_written(tmp_path: Path) -> None:
    write(tmp_path / "codes", levels=1)
    names = sorted(path.name for path in (tmp_path / "codes").iterdir())
    trains = [f"train_{i:05d}.npy" for i in range(3)]
    assert names == ["held_out_00000.npy", "manifest.json", *trains]


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    name=st.sampled_from(["manifest.json", FIRST, "held_out_00000.npy"]),
    share=st.floats(0, 1),
    inserted=st.binary(max_size=9),
    dropped=st.integers(0, 40),
)
def test_a_folder_with_a_damaged_file_is_read_or_refused_in_one_line(
    name: str, share: float, inserted: bytes, dropped: int, tmp_path: Path
) -> None:
    folder = tmp_path / "codes"
    if not folder.exists():
        write(folder, levels=2)
    content = (folder / name).read_bytes()
    place = int(share * len(content))
    (folder / name).write_bytes(content[:place] + inserted + content[place + dropped :])
    problem = ""
    try:
        for part in open_codes(folder).values():
            part.batch(np.arange(len(part)))
            part.counts()
    except ConfigError as error:
        problem = str(error)
    finally:
        (folder / name).write_bytes(content)
    assert "\n" not in problem
