"""A voice is on one side, wherever its recordings lie."""

from __future__ import annotations

import pytest

from simvq_moe.data.media.speakers import speaker_of, voices


@pytest.mark.parametrize(
    ("name", "speaker"),
    [
        ("84/121123/84_121123_000007_000001.wav", "84"),
        ("train-clean-100/84/121123/84-121123-0001.flac", "84"),
        ("wav48/p225/p225_001.wav", "p225"),
        ("p225/p225_001_mic1.flac", "p225"),
        ("alice/chapter 2/3.wav", "alice"),
        ("wav/id10001/1zcIwhmdeo4/00001.wav", "id10001"),
        ("digits/1.wav", None),
        ("0/default.wav", None),
        ("1.wav", None),
    ],
)
def test_a_path_names_its_speaker(name: str, speaker: str | None) -> None:
    assert speaker_of(name) == speaker


def test_copies_join_those_who_share_them() -> None:
    names = ["a/a_1.wav", "b/b_1.wav", "c/c_1.wav", "c/c_2.wav", "copy.wav", "alone.wav"]
    keys = ["1", "2", "1", "3", "2", "4"]
    found = voices(names, keys)
    assert found is not None
    assert found[0] == found[2] == found[3] != found[1]
    assert found[1] == found[4]
    assert found[5] not in found[:5]


def test_one_speaker_is_no_split() -> None:
    assert voices(["a/a_1.wav", "a/a_2.wav", "x.wav"], ["1", "2", "3"]) is None
    assert voices(["a/a_1.wav", "b/b_1.wav"], ["1", "1"]) is None
    assert voices(["1.wav", "2.wav"], ["1", "2"]) is None
    assert voices([], []) is None
