"""Token shards: rows of codes on disk, and the sequences that a language model sees of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
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
from simvq_moe.merging import ConfigError


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
