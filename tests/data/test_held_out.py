"""Equal contents lie on one side of a split, and names don't decide it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simvq_moe.data.held_out import BLOCK, content_key, file_key, held_out_by_content

keys = st.lists(st.sampled_from([content_key(bytes([i])) for i in range(12)]), max_size=40)


@given(keys=keys, share=st.floats(0, 1))
def test_equal_contents_lie_on_one_side(keys, share):
    sides = held_out_by_content(keys, share)
    assert len(set(zip(keys, sides, strict=True))) == len(set(keys))
    if len(set(keys)) > 1:
        assert set(sides) == {False, True}


@given(keys=keys, share=st.floats(0, 1))
def test_equal_contents_of_an_embedded_set_lie_on_one_side(keys, share):
    names = [f"{i}.py" for i in range(len(keys))]
    sides = held_out_by_content(keys, share, names=names)
    assert len(set(zip(keys, sides, strict=True))) == len(set(keys))


def test_a_content_keeps_its_side_when_others_come():
    keys = [content_key(b"%d" % i) for i in range(1000)]
    held_out = held_out_by_content(keys, 0.1)
    assert 70 < sum(held_out) < 130
    assert held_out_by_content(keys[:300], 0.1) == held_out[:300]


def test_nothing_is_held_out_of_equal_contents_alone():
    assert held_out_by_content(["a", "a"], 0.5) == [False, False]
    assert held_out_by_content([], 0.5) == []


@pytest.mark.parametrize("size", [0, 1, 3 * BLOCK, 3 * BLOCK + 1, 10 * BLOCK])
def test_the_key_of_a_file_is_that_of_its_content(size, tmp_path):
    content = bytearray(i % 251 for i in range(size))
    for name in ("a", "b", "changed", "longer"):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "longer").write_bytes(content + b"\0")
    found = {name: file_key(tmp_path / name) for name in ("a", "b", "link", "longer")}
    assert found["a"] == found["b"] == found["link"] != found["longer"]
    for place in {0, size // 2, size - 1} if size else ():
        changed = content.copy()
        changed[place] ^= 1
        (tmp_path / "changed").write_bytes(changed)
        assert file_key(tmp_path / "changed") != found["a"]
