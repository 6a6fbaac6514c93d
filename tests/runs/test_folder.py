"""A run's folder belongs to one process, is left as it was by a refused one, and outlives a power
cut."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simvq_moe.cli import main
from simvq_moe.config.loading import merge_files, to_yaml
from simvq_moe.config.schema import Config
from simvq_moe.engine.world import World
from simvq_moe.errors import ConfigError
from simvq_moe.files.of_runs import NOISE
from simvq_moe.files.regular import write_atomically
from simvq_moe.runs import folder as folders
from simvq_moe.runs.folder import LOCK, check_same_run, check_shared, claimed, has_summary, log_file
from simvq_moe.runs.history import commit
from simvq_moe.training.loop import Trainer
from tests.launching import ROOT, environment, metrics, run, start_tasks
from tests.short_training import train_flags

IMAGE = (
    *("--data.image_size", "16", "--data.crops", "16", "--data.held_out_crops", "4"),
    *("--quantizer.kind", "vq", "--quantizer.codes", "8", "--quantizer.width", "4"),
    *("--image_tokenizer.hidden", "4", "--image_tokenizer.downsamplings", "1"),
    *("--image_tokenizer.residual_blocks", "1", "--train.batch_size", "4", "--train.steps", "2"),
)
TEXT = (
    *("--task", "language_model", "--data.source", "corpus", "--data.vocabulary", "257"),
    *("--data.context", "16", "--language_model.width", "8", "--language_model.layers", "1"),
    *("--language_model.heads", "2", "--moe.experts", "4", "--moe.top_k", "2"),
    *("--moe.hidden", "4", "--train.batch_size", "4", "--train.log_every", "1"),
    *("--train.eval_every", "2", "--train.save_every", "2", "--train.probe_tokens", "64"),
)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "group" / "run"


def test_a_folder_is_one_process_at_a_time(run_dir: Path) -> None:
    with claimed(run_dir):
        (run_dir / "metrics.jsonl").write_text("of the one that trains\n")
        with pytest.raises(ConfigError, match="another process is training in"), claimed(run_dir):
            raise AssertionError
        assert (run_dir / "metrics.jsonl").is_file()
        assert (run_dir / LOCK).is_file()
    with claimed(run_dir):
        pass


def start_and_be_refused(run_dir: Path, file: str = NOISE, begun: bool = False) -> None:
    with claimed(run_dir) as folder:
        (run_dir / file).parent.mkdir(exist_ok=True)
        (run_dir / file).write_text("noise")
        folder.begun = begun
        raise ConfigError("no such data")


def refuse(run_dir: Path, file: str = NOISE, begun: bool = False) -> None:
    with pytest.raises(ConfigError, match="no such data"):
        start_and_be_refused(run_dir, file, begun)


def test_a_refused_start_leaves_nothing_of_its_own(run_dir: Path, tmp_path: Path) -> None:
    refuse(run_dir)
    assert list(tmp_path.iterdir()) == []


def test_a_refused_start_leaves_what_others_put_there(run_dir: Path) -> None:
    run_dir.mkdir(parents=True)
    (run_dir / "launcher.log").write_text("of a sweep")
    refuse(run_dir)
    assert [p.name for p in run_dir.iterdir()] == ["launcher.log"]
    (run_dir / NOISE).write_text("of a run before")
    (run_dir / LOCK).touch()
    refuse(run_dir)
    assert sorted(p.name for p in run_dir.iterdir()) == [LOCK, "launcher.log", NOISE]


def test_a_refused_start_leaves_a_folder_that_others_have_filled_since(run_dir: Path) -> None:
    refuse(run_dir, "notes.txt")
    assert [p.name for p in run_dir.iterdir()] == ["notes.txt"]


def test_every_rank_has_a_file_for_noise_which_a_refused_start_takes_away(run_dir: Path) -> None:
    assert log_file(run_dir, 0) == run_dir / NOISE
    log_file(run_dir, 1).parent.mkdir(parents=True)
    log_file(run_dir, 1).write_text("of a run before")
    refuse(run_dir)
    assert log_file(run_dir, 1).read_text() == "of a run before"
    shutil.rmtree(run_dir)
    refuse(run_dir, str(log_file(run_dir, 2).relative_to(run_dir)))
    assert not run_dir.exists()


def test_of_a_run_that_has_begun_nothing_is_removed(run_dir: Path) -> None:
    refuse(run_dir, begun=True)
    assert sorted(p.name for p in run_dir.iterdir()) == [LOCK, NOISE]


def test_a_folder_that_is_removed_between_making_and_locking_is_made_again(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process makes the folder first, is refused by its data, and takes it away again."""
    lock, removed = fcntl.flock, []

    def late(*args: Any) -> None:
        if not removed:
            removed.append(run_dir)
            shutil.rmtree(run_dir)
        lock(*args)

    monkeypatch.setattr(fcntl, "flock", late)
    with claimed(run_dir):
        assert (run_dir / LOCK).is_file()
    assert removed


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_without_locks_a_run_is_warned_and_goes_on(
    run_dir: Path, number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with claimed(run_dir):
        pass
    (line,) = capsys.readouterr().err.splitlines()
    assert f"no locks ({os.strerror(number)})" in line


def no_folder_sync(descriptor: int) -> None:
    if os.path.isdir(f"/proc/self/fd/{descriptor}"):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


def test_without_a_sync_of_folders_a_folder_can_be_had(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", no_folder_sync)
    with claimed(run_dir):
        pass


@pytest.mark.parametrize("name", ["file/run", "taken/run", "file/deeper/run", "new/" + "x" * 300])
def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("a file")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "run").write_text("a file")
    with pytest.raises(ConfigError, match=r"can't be made or written: .*--runs_dir"):
        ExitStack().enter_context(claimed(tmp_path / name))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "taken"]


def test_ranks_that_do_not_share_the_folder_are_told(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "SECONDS_TO_APPEAR", 0.3)
    with claimed(run_dir) as folder:
        check_shared(run_dir, folder.mark)
        with pytest.raises(ConfigError, match="give one that all machines share"):
            check_shared(run_dir, "of another")
        with pytest.raises(ConfigError, match="give one that all machines share"):
            check_shared(run_dir.with_name("elsewhere"), folder.mark)


TORN: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: content[:0],
    "half": lambda content: content[: len(content) // 2],
    "a third": lambda content: content[: len(content) // 3],
    "nearly whole": lambda content: content[:-2],
    "zeros": lambda content: bytes(len(content)),
}
RECORDS = (
    *("usage.npz", "probe.npz", "spectra.npz", "metrics.jsonl", "meta.json", "config.yaml"),
    *("tokenizer.json", "summary.json"),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, world: World) -> Path:
    """A finished run of 4 steps, in a working directory with its data."""
    root = tmp_path_factory.mktemp("torn")
    (root / "corpus").mkdir()
    for i in range(30):
        (root / "corpus" / f"{i}.txt").write_text(f"document {i} of some words of a text " * 20)
    flags = (*TEXT, "--data.source", str(root / "corpus"), "--train.steps", "4")
    finished = train_flags(world, root, *flags, "--moe.expert_out_map.kind", "linear")
    (finished / "meta.json").write_text(json.dumps({"command": "simvq-moe train"}))
    write_atomically(finished / "summary.json", json.dumps({"status": "finished", "step": 4}))
    return finished


@pytest.mark.parametrize("record", RECORDS)
def test_a_run_goes_on_from_its_checkpoint_whatever_a_power_cut_left_of_a_record(
    whole: Path, world: World, tmp_path: Path, record: str
) -> None:

    saved = merge_files(Config, [whole / "config.yaml"])
    longer = replace(saved, runs_dir=str(tmp_path), train=replace(saved.train, steps=6))
    for how, torn in TORN.items():
        config = replace(longer, name=how)
        shutil.copytree(whole, config.run_dir)
        write_atomically(
            config.run_dir / "config.yaml", to_yaml(replace(config, train=saved.train))
        )
        path = config.run_dir / record
        path.write_bytes(torn(path.read_bytes()))
        check_same_run(config)
        assert has_summary(config.run_dir) == (record != "summary.json")
        trainer = Trainer(config, world, lambda: False)
        trainer.run()
        trainer.close()
        assert trainer.resumed_from == 4
        steps = [line["step"] for line in metrics(config.run_dir)]
        assert steps[-2:] == [5, 6]
        assert steps == [1, 2, 3, 4, 5, 6] or record == "metrics.jsonl"
        with np.load(config.run_dir / "usage.npz") as usage:
            assert usage["steps"].tolist()[-2:] == [5, 6]
        content = (whole / "tokenizer.json").read_bytes()
        assert (config.run_dir / "tokenizer.json").read_bytes() == content


def test_a_torn_config_lets_no_other_config_in(whole: Path, tmp_path: Path) -> None:

    config = replace(merge_files(Config, [whole / "config.yaml"]), runs_dir=str(tmp_path))
    shutil.copytree(whole, config.run_dir)
    (config.run_dir / "config.yaml").write_bytes(b"")
    other = replace(config, optimizer=replace(config.optimizer, lr=0.5))
    with pytest.raises(ConfigError, match=r"another config \(optimizer\.lr was"):
        check_same_run(other)
    check_same_run(config)


def test_a_finished_run_is_not_taken_apart_by_a_start_that_is_refused(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    saved = replace(merge_files(Config, [whole / "config.yaml"]), runs_dir=str(tmp_path))
    shutil.copytree(whole, saved.run_dir)
    write_atomically(saved.run_dir / "config.yaml", to_yaml(saved))
    monkeypatch.chdir(tmp_path)
    before = {p: p.read_bytes() for p in saved.run_dir.rglob("*") if p.is_file()}
    changed = whole.parents[1] / "corpus" / "more.txt"
    changed.write_text("other words than those it began with " * 50)
    try:
        assert (
            main(["train", "--config", str(saved.run_dir / "config.yaml"), "--train.steps", "9"])
            == 2
        )
    finally:
        changed.unlink()
    assert "are not those that" in capsys.readouterr().err.splitlines()[-1]
    assert {p: p.read_bytes() for p in saved.run_dir.rglob("*") if p.is_file()} == before


@pytest.mark.distributed
def test_two_ranks_that_the_data_refuse_say_so_and_leave_the_name_to_the_corrected_config(
    tmp_path: Path,
) -> None:
    tasks = start_tasks("train", "--name", "a", *IMAGE, "--data.image_size", "4096", cwd=tmp_path)
    errors = [task.communicate(timeout=300)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [2, 2], errors
    assert errors[1] == ""
    assert "4096" in errors[0]
    assert "Traceback" not in errors[0]
    assert not (tmp_path / "runs").exists()
    tasks = start_tasks("train", "--name", "a", *IMAGE, cwd=tmp_path)
    errors = [task.communicate(timeout=300)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], errors


def test_a_finished_run_leaves_nothing_in_the_temporary_folder_and_others_can_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)
    before = os.umask(0o022)
    try:
        finished = run("train", *IMAGE, cwd=tmp_path)
    finally:
        os.umask(before)
    assert finished.returncode == 0, finished.stderr
    assert list(temporary.iterdir()) == []
    files = [p for p in (tmp_path / "runs").rglob("*") if p.is_file()]
    assert any(p.suffix == ".safetensors" for p in files)
    assert {p.stat().st_mode & 0o777 for p in files} == {0o644}


def git(folder: Path, *args: str) -> None:
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *who, *args], cwd=folder, check=True, capture_output=True)


def test_a_commit_is_recorded_only_of_a_checkout_of_our_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for project, name in ((ours, "simvq-moe"), (theirs, "other")):
        for package in (project / "simvq_moe", project / "lib" / "simvq_moe"):
            package.mkdir(parents=True)
            (package / "__init__.py").touch()
        (project / "pyproject.toml").write_text(f'[project]\nname = "{name}"\n')
        git(project, "init")
        (project / ".gitignore").write_text("lib\n")
        assert commit(project / "simvq_moe") is None  # nothing is tracked yet
        git(project, "add", ".")
        git(project, "commit", "--message", "first")
    found = commit(ours / "simvq_moe")
    assert found is not None
    assert len(found) == 12
    monkeypatch.setenv("GIT_DIR", str(theirs / ".git"))  # as inside of a hook
    assert commit(ours / "simvq_moe") == found
    assert commit(ours / "lib" / "simvq_moe") is None
    assert commit(theirs / "simvq_moe") is None
    assert commit(theirs / "lib" / "simvq_moe") is None
    monkeypatch.setenv("PATH", str(tmp_path))  # without git
    assert commit(ours / "simvq_moe") is None


@pytest.mark.distributed
def test_a_taken_port_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        command = ["simvq-moe", "train", *IMAGE]
        env = environment() | place | {"MASTER_PORT": port}
        ended = subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=120
        )
    assert ended.returncode == 2, ended.stderr
    assert f"MASTER_PORT {port} of this machine is taken" in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


def test_launchers_take_a_free_port() -> None:
    script = f"source {ROOT}/launch/environment.sh && free_port && port_is_free $(free_port)"
    ended = subprocess.run(
        ["bash", "-euc", script], env=environment(), capture_output=True, text=True, check=True
    )
    with socket.socket() as free:
        free.bind(("", int(ended.stdout)))
