"""Components in a config: which kind, which options, and what stays when the kind changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from simvq_moe.config import old_keys
from simvq_moe.config.flags import with_flags
from simvq_moe.config.loading import (
    changed,
    first_difference,
    flatten,
    key_names,
    merge_files,
    to_yaml,
    with_overrides,
)
from simvq_moe.config.ranges import Range, ranges_of
from simvq_moe.errors import ConfigError
from tests.config.shapes import Circle, Drawing, Plain, Polygon, Star, Striped

DRAWING = Drawing("a")


def read(tmp_path: Path, *texts: str) -> Drawing:
    files = [tmp_path / f"{i}.yaml" for i in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text)
    return merge_files(Drawing, files)


def flagged(*flags: str) -> Drawing:
    return with_flags(DRAWING, flags, "draw")


def refused(**shape: Any) -> str:
    with pytest.raises(ConfigError) as error:
        with_overrides(DRAWING, {"shape": shape}, "here")
    assert "\n" not in str(error.value)
    return str(error.value)


def refused_flags(*flags: str) -> str:
    with pytest.raises(ConfigError) as error:
        flagged(*flags)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_kind_is_the_one_named_or_the_one_so_far_or_the_familys_default(tmp_path: Path) -> None:
    assert read(tmp_path, "title: a").shape == Circle()
    assert read(tmp_path, "{title: a, shape: {size: 3}}").shape == Circle(size=3)
    found = read(tmp_path, "{title: a, shape: {kind: star, corners: 7}}", "shape: {size: 4}")
    assert found.shape == Star(corners=7, size=4)
    assert read(tmp_path, "{title: a, frame: {size: 4}}").frame == Polygon(corners=4, size=4)


def test_a_component_may_be_inside_another(tmp_path: Path) -> None:
    text = "{title: a, shape: {kind: star, paint: {kind: striped, stripes: 4}}}"
    assert read(tmp_path, text).shape == Star(paint=Striped(stripes=4))
    found = read(tmp_path, text, "shape: {kind: circle}").shape
    assert found == Circle(paint=Striped(stripes=4))
    assert read(tmp_path, text, "shape: {paint: {kind: plain}}").shape == Star(paint=Plain())


@pytest.mark.parametrize("by", ["file", "flag", "arm"])
def test_what_was_set_stays_where_the_new_kind_has_it_and_can_take_it(
    by: str, tmp_path: Path
) -> None:
    before = {"corners": 8, "size": 30, "style": "rounded", "gap": 0.5}
    text = f"{{title: a, shape: { ({'kind': 'polygon'} | before) }}}".replace("'", "")
    base = read(tmp_path, text)

    def changed_to(kind: str) -> Any:
        if by == "file":
            return read(tmp_path, text, f"shape: {{kind: {kind}}}").shape
        if by == "flag":
            return with_flags(base, ["--shape.kind", kind], "draw").shape
        return with_overrides(base, {"shape": {"kind": kind}}, "arm").shape

    # not `corners`, which circles lack, nor `style`, which is another choice, nor `gap`, whose
    # value was the default of polygons and not chosen
    assert changed_to("circle") == Circle(size=30)
    assert changed_to("star") == Star(size=30, corners=8)
    assert changed_to("polygon") == base.shape


def test_keys_beside_a_new_kind_lie_on_top_of_what_stays() -> None:
    base = with_overrides(DRAWING, {"shape": {"kind": "polygon", "corners": 8}}, "here")
    on_top = {"shape": {"corners": 5, "kind": "star", "size": 2}}
    assert with_overrides(base, on_top, "here").shape == Star(corners=5, size=2)


def test_a_wrong_kind_is_answered_with_all_of_them() -> None:
    line = refused(kind="square")
    assert line == "here: shape.kind 'square': use one of 'circle', 'polygon', 'star'"
    line = refused_flags("--shape.kind", "square")
    assert "--shape.kind 'square': use one of 'circle', 'polygon', 'star'" in line
    assert "here: shape.kind 3: use one of" in refused(kind=3)
    assert "shape.paint.kind 'x': use one of 'plain', 'striped'" in refused(paint={"kind": "x"})


def test_an_option_of_another_kind_is_answered_with_that_kind() -> None:
    assert refused(kind="star", gap=1) == (
        "here: shape.gap 1 belongs to shape.kind 'circle' or 'polygon', not 'star': drop it, or "
        "use one of them"
    )
    line = refused_flags("--shape.paint.stripes=3")
    assert "--shape.paint.stripes 3 belongs to shape.paint.kind 'striped', not 'plain'" in line
    assert "use that kind" in line
    assert "unknown key shape.szie. Did you mean" in refused(szie=1)
    assert "unknown --shape.szie 1. Did you mean shape.size" in refused_flags("--shape.szie", "1")


def test_kinds_of_flags_come_first_wherever_they_stand_and_the_last_holds() -> None:
    found = flagged("--shape.corners", "9", "--shape.kind=star", "--shape.size", "5")
    assert found.shape == Star(corners=9, size=5)
    found = flagged("--shape.kind", "star", "--shape.kind", "polygon", "--shape.corners", "9")
    assert found.shape == Polygon(corners=9)
    inner = ("--shape.paint.kind", "striped", "--shape.paint.stripes", "9", "--shape.kind", "star")
    assert flagged(*inner).shape == Star(paint=Striped(stripes=9))
    assert "Missing value" in refused_flags("--shape.kind")


def test_help_shows_the_options_in_force_and_names_the_other_kinds(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        flagged("--help", "--shape.kind", "star")
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--shape.kind {circle,polygon,star}" in printed
    assert "--shape.corners INT Number of points. (default: 5)" in printed
    assert "--shape.gap" not in printed
    assert "--shape.paint.kind {plain,striped}" in printed


def test_a_written_config_reads_back_equal(tmp_path: Path) -> None:
    found = flagged("--shape.kind", "star", "--shape.paint.kind", "striped", "--frame.size", "7")
    assert read(tmp_path, to_yaml(found)) == found


def test_leaves_differences_and_names_know_components() -> None:
    star = flagged("--shape.kind", "star", "--shape.size", "7")
    assert flatten(star)["shape.corners"] == 5
    assert first_difference(DRAWING, star) == "shape.kind was 'circle' and is now 'star'"
    assert first_difference(star, DRAWING) == "shape.kind was 'star' and is now 'circle'"
    assert first_difference(star, star) is None
    assert changed(star) == {"title": "a", "shape.kind": "star", "shape.size": 7}
    assert changed(DRAWING) == {"title": "a"}
    names = key_names(Drawing)
    assert {"shape.gap", "shape.corners", "shape.paint.stripes", "frame"} <= set(names)
    assert len(names) == len(set(names))


def test_ranges_stand_in_the_types_of_fields() -> None:
    star = flagged("--shape.kind", "star", "--shape.paint.kind", "striped")
    found = ranges_of(star)
    assert found["shape.corners"] == Range(3, 12)
    assert found["shape.paint.stripes"] == Range(2, 99)
    assert "shape.gap" not in found
    assert found["frame.gap"] == Range(0, 1)


def test_an_old_key_is_answered_with_the_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    old = {"shape.colour": "shape.paint.kind", "shape.paint": "paint.kind"}
    monkeypatch.setattr(old_keys, "OLD_KEYS", old)
    assert refused(colour="x") == "here: shape.colour is now shape.paint.kind: rename it"
    assert "--shape.colour is now --shape.paint.kind" in refused_flags("--shape.colour", "x")
    assert refused(paint="striped") == "here: shape.paint is now paint.kind: rename it"


def test_what_no_file_sets_is_named_and_a_later_file_may_set_it(tmp_path: Path) -> None:
    assert read(tmp_path, "shape: {size: 3}", "title: b").title == "b"
    with pytest.raises(ConfigError, match=r"1\.yaml does not set title: add what is missing"):
        read(tmp_path, "shape: {size: 3}", "shape: {size: 4}")
