"""Token shards back to files, by the tokenizer that encoded them."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np

from simvq_moe.data.code_items import Item, read_items, window_of
from simvq_moe.data.codes import CodeSequences, open_codes
from simvq_moe.engine.devices import this_device
from simvq_moe.files.unfinished import check_free, filling
from simvq_moe.tasks.decoder import Decoder


def decode_folder(folder: Path, out: Path, limit: int | None) -> int:
    """Write the images or recordings of both parts, or the samples where these are crops, as
    out/train/000000.png ... or .wav; how many.

    Killed at any moment, the same call goes on with the files that are missing.

    Args:
        limit: of each part; None: all.

    Raises:
        ConfigError: the folder can't be decoded or `out` is not empty.
    """
    check_free(out)
    parts = open_codes(folder)
    decoder = Decoder(folder, this_device())
    items = read_items(folder, decoder.manifest) if decoder.manifest.whole else None
    made_of = {"codes": decoder.manifest.digest, "limit": limit}
    written = 0
    with filling(out, "decode", made_of):
        for part, sequences in parts.items():
            (out / part).mkdir(exist_ok=True)
            if items is None:
                written += _decode_samples(decoder, sequences, out / part, limit)
            else:
                written += _decode_items(decoder, sequences, items[part], out / part, limit)
    return written


def _decode_samples(
    decoder: Decoder, sequences: CodeSequences, out: Path, limit: int | None
) -> int:
    number = len(sequences) if limit is None else min(limit, len(sequences))
    for start in range(0, number, decoder.batch_size):
        indices = range(start, min(start + decoder.batch_size, number))
        if not all((out / decoder.file_name(i)).is_file() for i in indices):
            decoder.write(sequences.batch(np.array(indices)), out, start)
    return number


def _decode_items(
    decoder: Decoder,
    sequences: CodeSequences,
    items: Sequence[Item],
    out: Path,
    limit: int | None,
) -> int:
    first, window = 0, window_of(decoder.manifest)
    for i, item in enumerate(items[:limit]):
        if not (out / decoder.file_name(i)).is_file():
            decoder.write_whole(sequences, first, item, out / decoder.file_name(i))
        first += prod(item.grid(window))
    return len(items[:limit])
