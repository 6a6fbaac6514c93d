"""What a prediction needs is measured, and steps beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from simvq_moe.benchmarks.cluster import bench_cluster, cluster_file, cluster_table
from simvq_moe.benchmarks.train import config_of
from simvq_moe.cli import main
from simvq_moe.config.schema import Config, DataConfig
from simvq_moe.costs.cluster import read_cluster
from simvq_moe.errors import ConfigError
from tests.launching import ROOT

TINY = config_of(width=16, heads=2, layers=1, experts=4, top_k=2, hidden=8)


@pytest.mark.slow
@pytest.mark.distributed
def test_one_rank_and_several_are_measured_and_predicted(tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    data = DataConfig(source=str(ROOT / "tests" / "moe"), vocabulary=300, cache_dir=cache)
    one, two = bench_cluster([replace(TINY, data=data)], rounds=3)
    assert [r.cluster.gpus for r in (one, two)] == [1, 2]
    assert one.prediction.communication_s == 0 < two.prediction.communication_s
    assert two.communication_s > one.communication_s
    for r in (one, two):
        assert 0 < r.forward_backward_s + r.optimizer_s + r.communication_s < 1.5 * r.step_s
    assert cluster_table([one, two]).count("|     2 |") == 1
    (tmp_path / "here.yaml").write_text(cluster_file(two))
    assert read_cluster(tmp_path / "here.yaml") == two.cluster


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (Config(), "task 'image_tokenizer'"),
        (replace(TINY, train=replace(TINY.train, batch_size=12)), "does not divide by --ranks 2"),
        (replace(TINY, moe=replace(TINY.moe, expert_parallel=2)), "expert_parallel 2: .* use 1"),
    ],
)
def test_what_can_not_be_measured_is_refused(config: Config, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        bench_cluster([config])


LANGUAGE = ("--config", str(ROOT / "configs" / "language_quickstart.yaml"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--out", "here.yaml"), "add --config"),
        ((*LANGUAGE, "--ranks", "1", "--out", "here.yaml"), "--ranks 1 with --out"),
        ((*LANGUAGE, "--out", "old.yaml"), "--out old.yaml exists"),
        ((*LANGUAGE, "--out", "no/here.yaml"), "--out no/here.yaml: make the folder no first"),
        ((*LANGUAGE, "--json", "."), "--json . is a folder"),
    ],
)
def test_what_can_not_be_written_is_refused_before_it_is_measured(
    flags: tuple[str, ...],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.yaml").write_text("mine: 1\n")
    assert main(["bench", "cluster", *flags]) == 2
    assert words in capsys.readouterr().err
    assert [p.read_text() for p in tmp_path.iterdir()] == ["mine: 1\n"]


def test_data_that_are_not_there_are_the_configs_mistake() -> None:
    data = replace(TINY.data, source="nowhere/at/all")
    with pytest.raises(ConfigError, match="nowhere/at/all"):
        bench_cluster([replace(TINY, data=data)], rounds=1)
