"""Who speaks in a recording, by its path, so that no voice is heard in training and held out."""

from __future__ import annotations

from collections.abc import Sequence


def speaker_of(name: str) -> str | None:
    """The speaker that the path of a recording names, by two rules; None: it names none.

    1. The outermost folder whose name begins the file's name, before "_" or "-":
       84/121123/84_121123_000007_000001.wav (LibriTTS, LibriSpeech), p225/p225_001.wav (VCTK).
    2. Else, at least two folders deep, the folder above the file's: speaker/chapter/utterance.wav.

    Args:
        name: path below the source, with slashes.
    """
    *folders, file = name.split("/")
    for folder in folders:
        if file.startswith((f"{folder}_", f"{folder}-")):
            return folder
    return folders[-2] if len(folders) > 1 else None


def voices(names: Sequence[str], keys: Sequence[str]) -> list[str] | None:
    """What recordings are split by: equal for those of a speaker, and for copies.

    A recording without a speaker stands for itself.

    Args:
        names: paths of the recordings below the source.
        keys: of their contents.

    Returns:
        None where the paths name fewer than two speakers that share nothing.
    """
    speakers = [speaker_of(name) for name in names]
    known: dict[str, str] = {}  # from a speaker to one that shares a recording with them

    def root(speaker: str) -> str:
        while known.setdefault(speaker, speaker) != speaker:
            speaker = known[speaker]
        return speaker

    first: dict[str, str] = {}
    for speaker, key in zip(speakers, keys, strict=True):
        if speaker is not None:
            one, other = sorted((root(speaker), root(first.setdefault(key, speaker))))
            known[other] = one
    if len({root(speaker) for speaker in known}) < 2:
        return None
    # a copy without a speaker goes where its original is
    return [root(first[key]) if key in first else key for key in keys]
