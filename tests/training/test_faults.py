"""Whatever goes wrong, what was saved stays, and the same command goes on as if nothing had."""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from simvq_moe.cli import main
from simvq_moe.config.checks import check
from simvq_moe.config.flags import with_flags
from simvq_moe.config.schema import Config
from simvq_moe.data.order import StepBatches
from simvq_moe.engine.agreement import TrainingFailed
from simvq_moe.engine.optimizer import learning_rate_factor
from simvq_moe.engine.world import World
from simvq_moe.errors import ConfigError
from simvq_moe.runs import checkpoint
from simvq_moe.training.loop import Trainer
from simvq_moe.training.watchdog import Place, find_hang, read_places
from tests.launching import (
    ROOT,
    Forked,
    metrics,
    rank_of,
    run_forked,
    start,
    start_local,
    start_tasks,
    stop_where,
    wait_until,
)
from tests.short_training import train_flags
from tests.two_ranks import TwoRanks

IMAGE = (
    *("--quantizer.codes", "16", "--quantizer.width", "4", "--image_tokenizer.hidden", "4"),
    *("--quantizer.kind", "ema", "--quantizer.restart", "0.1", "--train.accumulation", "2"),
    *("--data.crops", "64", "--data.held_out_crops", "18", "--train.batch_size", "8"),
)
TEXT = (
    *("--task", "language_model", "--data.vocabulary", "300"),
    *("--data.context", "16", "--language_model.width", "16", "--language_model.heads", "2"),
    *("--language_model.layers", "2", "--moe.experts", "8", "--moe.top_k", "2"),
    *("--moe.expert_parallel", "2", "--moe.balance.kind", "loss_free"),
    *("--moe.expert_out_map.kind", "linear"),
    *("--train.batch_size", "8", "--train.accumulation", "2", "--train.probe_tokens", "64"),
    *("--train.dtype", "bf16", "--moe.router.map.kind", "linear"),
)
LAST = 48
STEPS = ("--train.steps", str(LAST), "--train.save_every", "4", "--train.log_every", "3")
TASKS = {"image": (*IMAGE, *STEPS), "text": (*TEXT, "--data.source", "corpus", *STEPS)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a small corpus."""
    root = tmp_path_factory.mktemp("faults")
    write_corpus(root / "corpus")
    return root


def write_corpus(folder: Path) -> None:
    folder.mkdir()
    for file in sorted((ROOT / "tests" / "core").glob("*.py")):
        (folder / file.name).write_text(file.read_text())


def train(folder: Path, name: str, *flags: str) -> tuple[list[int | None], list[str]]:
    """Exit codes and standard errors of two ranks, to their end."""
    tasks = start_tasks("train", "--name", name, *flags, cwd=folder)
    errors = [task.communicate(timeout=600)[1] for task in tasks]
    return [task.returncode for task in tasks], errors


@pytest.fixture(scope="module")
def whole(folder: Path, two_ranks: TwoRanks) -> dict[str, Path]:
    """The undisturbed run of each task."""
    found = {}
    for task, flags in TASKS.items():
        source = ("--data.source", str(folder / "corpus")) if task == "text" else ()
        name = ("--name", f"whole_{task}")
        found[task], _ = two_ranks(train_flags, folder, *flags, *source, *name)
    return found


def weights(run_dir: Path) -> Mapping[str, Tensor]:
    step = (run_dir / "checkpoints" / "latest").read_text()
    return checkpoint.load_weights(run_dir / "checkpoints" / step)


def assert_same(run_dir: Path, undisturbed: Path) -> None:
    """Both runs left the same numbers, to the bit."""
    assert metrics(run_dir) == metrics(undisturbed)
    with np.load(run_dir / "usage.npz") as a, np.load(undisturbed / "usage.npz") as b:
        for key in b:
            np.testing.assert_array_equal(a[key], b[key])
    assert_close(weights(run_dir), weights(undisturbed), rtol=0, atol=0)


def goes_on(folder: Path, name: str, task: str, saved: int, undisturbed: Path) -> None:
    """The same command goes on from what was saved, and ends as the undisturbed run."""
    codes, errors = train(folder, name, *TASKS[task])
    assert codes == [0, 0], errors
    assert f"resuming runs/{name} at step {saved}\n" in errors[0]
    assert_same(folder / "runs" / name, undisturbed)


def in_step(run_dir: Path, rank: int, after: int) -> Callable[[], bool]:
    """Whether a rank is inside a step later than this one."""

    def there() -> bool:
        place = read_places(run_dir, 2).get(rank)
        phases = ("data", "forward", "backward", "optimizer", "communication")
        return place is not None and place.step > after and place.phase in phases

    return there


def in_save(run_dir: Path, after: int) -> Callable[[], bool]:
    """Whether a later checkpoint than this one is half written."""
    return lambda: any(int(p.stem) > after for p in (run_dir / "checkpoints").glob("*.tmp"))


def newest(run_dir: Path) -> int:
    saved = checkpoint.latest_step(run_dir / "checkpoints")
    assert saved is not None
    return saved


@pytest.mark.distributed
def test_under_deepspeed_a_run_that_is_killed_in_a_save_and_preempted_goes_on_as_if_it_had_not_been(
    folder: Path, whole: dict[str, Path]
) -> None:
    command, run_dir = ("train", "--name", "killed", *TASKS["image"]), folder / "runs" / "killed"
    launcher = start_local(*command, cwd=folder)
    victim = rank_of(launcher, 0)
    stop_where(victim, in_save(run_dir, 4))
    saved = checkpoint.committed_steps(run_dir / "checkpoints")
    victim.kill()
    launcher.communicate(timeout=600)
    assert launcher.returncode == 256 - signal.SIGKILL
    killed_at = newest(run_dir)
    assert 4 <= saved[-1] <= killed_at < LAST
    # SIGTERM to the script, which the launcher would keep from the ranks
    launcher = start_local(*command, cwd=folder)
    wait_until(launcher, in_step(run_dir, 0, killed_at + 2))
    launcher.send_signal(signal.SIGTERM)
    error = launcher.communicate(timeout=600)[1]
    assert launcher.returncode == 130, error
    assert killed_at < newest(run_dir) < LAST
    assert f"runs/killed: stopped at step {newest(run_dir)}, which is saved" in error
    # also behind what the launcher has to say
    assert error.splitlines()[-1] == "stopped and saved: the same command goes on"
    goes_on(folder, "killed", "image", newest(run_dir), whole["image"])


@pytest.mark.distributed
def test_a_run_that_is_stopped_killed_and_preempted_goes_on_as_if_nothing_had_happened(
    folder: Path, whole: dict[str, Path]
) -> None:
    command, run_dir = ("train", "--name", "often", *TASKS["text"]), folder / "runs" / "often"
    # SIGTERM to torchrun, which passes it on
    launcher = start(*command, cwd=folder, ranks=2)
    wait_until(launcher, in_step(run_dir, 0, 5))
    launcher.send_signal(signal.SIGTERM)
    error = launcher.communicate(timeout=600)[1]
    stopped_at = newest(run_dir)
    assert f"runs/often: stopped at step {stopped_at}, which is saved" in error
    # SIGKILL to one task of two, which no launcher tells the other
    tasks = start_tasks(*command, cwd=folder)
    victim = psutil.Process(tasks[1].pid)
    stop_where(victim, in_step(run_dir, 1, stopped_at + 5))
    saved = checkpoint.committed_steps(run_dir / "checkpoints")
    victim.kill()
    error, _ = (task.communicate(timeout=600)[1] for task in tasks)
    assert [task.returncode for task in tasks] == [1, -signal.SIGKILL], error
    assert f"resuming runs/often at step {stopped_at}" in error
    # another rank may have renamed what was whole
    assert stopped_at < saved[-1] <= newest(run_dir) < LAST
    said = f"rank 0: another rank has ended (newest checkpoint: step {newest(run_dir)}); the same"
    assert f"runs/often: {said} command goes on" in error
    assert "gloo" not in error
    assert json.loads((run_dir / "meta.json").read_text())["error"].startswith(said)
    # SIGTERM to one task of two, and all agree to stop
    tasks = start_tasks(*command, cwd=folder)
    wait_until(tasks[0], in_step(run_dir, 0, newest(run_dir) + 5))
    tasks[1].send_signal(signal.SIGTERM)
    errors = [task.communicate(timeout=600)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [130, 130], errors
    assert f"runs/often: stopped at step {newest(run_dir)}, which is saved" in errors[0]
    goes_on(folder, "often", "text", newest(run_dir), whole["text"])
    assert json.loads((run_dir / "meta.json").read_text())["world_size"] == 2


def test_ctrl_c_saves_exits_with_130_and_the_run_goes_on_as_if_nothing_had_happened(
    folder: Path, world: World
) -> None:
    flags, run_dir = TASKS["image"], folder / "runs" / "stopped"
    undisturbed = train_flags(world, folder, *flags, "--name", "undisturbed")
    process = Forked("train", "--name", "stopped", *flags, cwd=folder)
    records = run_dir / "metrics.jsonl"
    stop_where(psutil.Process(process.pid), lambda: records.exists() and len(metrics(run_dir)) > 2)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    error = process.communicate(timeout=600)[1]
    assert process.returncode == 130, error
    stopped_at = newest(run_dir)
    assert 8 < stopped_at < LAST
    assert f"runs/stopped: stopped at step {stopped_at}, which is saved" in error
    meta = json.loads((run_dir / "meta.json").read_text())
    assert meta["threads"] == 1
    (run_dir / "meta.json").write_text(json.dumps(meta | {"threads": 7}))
    resumed = run_forked("train", "--name", "stopped", *flags, cwd=folder)
    assert resumed.returncode == 0, resumed.stderr
    other = "on 1 x 1 threads, not to the bit: it was on 1 x 7 threads"
    assert f"resuming runs/stopped at step {stopped_at} {other}\n" in resumed.stderr
    assert_same(run_dir, undisturbed)


@pytest.mark.distributed
def test_full_disks_end_all_ranks_with_one_line_and_lose_nothing(
    folder: Path, whole: dict[str, Path]
) -> None:
    run_dir = folder / "runs" / "full"
    flags = (*TASKS["text"], "--train.eval_every", "90", "--train.log_every")
    before = 0
    aside = ("--train.async_save", "True")
    for rank, log_every, how, room, words in (
        (1, "90", (), 1_000, "tmp/model_1.safetensors could not be"),
        (1, "90", aside, 1_000, "tmp/model_1.safetensors could not be"),
        (0, "90", (), 20_000, "tmp/model_0.safetensors could not be"),
        (0, "3", (), 1_000, "records of runs/full could not be"),
    ):
        tasks = start_tasks("train", "--name", "full", *flags, log_every, *how, cwd=folder)
        wait_until(tasks[rank], in_step(run_dir, rank, before + 5))
        # no file of this rank may grow beyond so many bytes from now on
        resource.prlimit(tasks[rank].pid, resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        errors = [task.communicate(timeout=600)[1] for task in tasks]
        assert [task.returncode for task in tasks] == [1, 1], errors
        before, previous = newest(run_dir), before
        assert before > previous
        line = errors[0].strip().splitlines()[-1]
        assert words in line
        assert "File too large" in line
        assert f"(newest: checkpoint runs/full/checkpoints/{before}); make room" in line
        assert "Traceback" not in errors[0] + errors[1]
        assert not list((run_dir / "checkpoints").glob("*.tmp"))
    codes, errors = train(folder, "full", *flags, "3")
    assert codes == [0, 0], errors
    steps = [line["step"] for line in metrics(run_dir)]
    assert steps == sorted(set(steps))
    assert_close(weights(run_dir), weights(whole["text"]), rtol=0, atol=0)


@pytest.mark.distributed
def test_a_rank_that_hangs_ends_the_run_by_name_and_place(
    folder: Path, whole: dict[str, Path]
) -> None:
    run_dir = folder / "runs" / "hung"
    flags = (*TASKS["text"], "--train.timeout_s", "5")
    tasks = start_tasks("train", "--name", "hung", *flags, cwd=folder)
    rank = psutil.Process(tasks[1].pid)
    stop_where(rank, in_step(run_dir, 1, 9))
    place = read_places(run_dir, 2)[1]
    error = tasks[0].communicate(timeout=600)[1]
    rank.kill()
    tasks[1].communicate()
    assert tasks[0].returncode == 1
    lines = [line for line in error.splitlines() if "has not finished" in line]
    assert len(lines) == 1
    assert f"runs/hung: rank 1 has not finished step {place.step} ({place.phase})" in lines[0]
    assert "no longer answers" in lines[0]
    assert json.loads((run_dir / "meta.json").read_text())["status"] == "failed"
    goes_on(folder, "hung", "text", newest(run_dir), whole["text"])


@pytest.mark.distributed
def test_a_finished_run_that_is_given_more_steps_is_the_longer_run(
    folder: Path,
    world: World,
    whole: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    del world
    flags, run_dir = TASKS["image"], folder / "runs" / "extended"
    codes, errors = train(folder, "extended", *flags, "--train.steps", "12")
    assert codes == [0, 0], errors
    monkeypatch.chdir(folder)
    assert main(["train", "--name", "extended", *flags, "--train.steps", "9"]) == 2
    assert "train.steps was 12 and is now 9" in capsys.readouterr().err
    codes, errors = train(folder, "extended", *flags)
    assert codes == [0, 0], errors
    assert f"runs/extended is given {LAST} steps in place of 12" in errors[0]
    assert_close(weights(run_dir), weights(whole["image"]), rtol=0, atol=0)
    # but for the evaluation at what was the last step
    lines = [line if line["step"] != 12 else {} for line in metrics(run_dir)]
    assert lines == [line if line["step"] != 12 else {} for line in metrics(whole["image"])]


def configured(folder: Path, *flags: str) -> Config:
    cache = ("--data.cache_dir", str(folder / "cache"), "--runs_dir", str(folder))
    return with_flags(Config(), (*flags, *cache), "train")


def test_the_rate_of_a_run_with_more_steps_is_that_of_the_longer_run(
    tmp_path: Path, world: World
) -> None:
    config = configured(tmp_path, *IMAGE, "--optimizer.final_lr_ratio", "0.1", "--train.steps", "4")
    config = replace(config, optimizer=replace(config.optimizer, warmup_steps=1))
    config.run_dir.mkdir(parents=True)
    trainer = Trainer(config, world, lambda: False)
    for _ in range(4):
        trainer.update()
    trainer.save()
    trainer.close()
    longer = replace(config, train=replace(config.train, steps=9))
    again = Trainer(longer, world, lambda: False)
    again.close()
    assert again.resumed_from == 4
    factor = learning_rate_factor(4, 9, config.optimizer)
    assert again.engine.get_lr() == pytest.approx([config.optimizer.lr * factor])


SKIP = ("--train.on_not_finite", "skip", "--train.log_every", "1", "--train.save_every", "1")


class Spoilt:
    """A reader of batches that are NaN where it is told."""

    def __init__(self, trainer: Trainer, spoils: Callable[[], bool]) -> None:
        self.batches: Any = trainer.reader.batches
        self.spoils = spoils

    def __next__(self) -> StepBatches:
        found = next(self.batches)
        if not self.spoils():
            return found
        return found._replace(micro_batches=[batch * torch.nan for batch in found.micro_batches])

    def close(self) -> None:
        self.batches.close()


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """All that training changes: weights and moments as they are saved, and every buffer."""
    from simvq_moe.engine.pieces import held_pieces

    found = {f"buffer/{name}": b.clone() for name, b in trainer.task.model.named_buffers()}
    return found | {piece.key: piece.data.clone() for piece in held_pieces(trainer.engine)}


def skips_one_step(config: Config, world: World, spoil: Callable[[Trainer], Any]) -> None:
    """Step 3 is spoilt and leaves all as it was; the run goes on, and may be resumed."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config, world, lambda: False)
    spoil(trainer)
    states = []
    for step in (1, 2, 3, 4):
        trainer.update()
        trainer.save()
        states.append(state_of(trainer))
        assert trainer.step == step
    assert_close(states[2], states[1], rtol=0, atol=0)
    assert any(not torch.equal(states[3][name], states[2][name]) for name in states[2])
    assert all(bool(tensor.isfinite().all()) for tensor in states[3].values())
    assert trainer.write_log()["train/skipped_steps"] == 1
    trainer.save()
    trainer.close()
    again = Trainer(config, world, lambda: False)
    again.close()
    assert again.resumed_from == 4
    assert again.engine.skipped_steps == 1


def spoil_batch(trainer: Trainer) -> None:
    """The last rank reads NaN in step 3."""
    here = trainer.world.rank == trainer.world.size - 1
    batches: Any = Spoilt(trainer, lambda: here and trainer.step == 2)
    trainer.reader.batches = batches


def spoil_gradient(trainer: Trainer) -> None:
    """The last rank has an infinite gradient of its own experts in step 3."""
    here = trainer.world.rank == trainer.world.size - 1

    def spoilt(gradient: Tensor) -> Tensor:
        return gradient * torch.inf if here and trainer.step == 2 else gradient

    experts = [p for n, p in trainer.task.model.named_parameters() if "experts.down" in n]
    experts[0].register_hook(spoilt)


@pytest.mark.parametrize("kind", ["ema", "vq", "simvq"])
def test_a_skipped_step_changes_nothing(
    tmp_path: Path, world: World, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    at = IMAGE.index("--quantizer.restart")  # which simvq does not have
    restart = () if kind == "simvq" else ("--quantizer.restart", "0.9")
    flags = (*IMAGE[:at], *IMAGE[at + 2 :], *SKIP, "--quantizer.kind", kind, *restart)
    skips_one_step(configured(tmp_path, *flags), world, spoil_batch)
    assert "step 3 is skipped: loss not finite (1 so far)" in caplog.text


def test_a_first_step_that_is_skipped_can_be_saved(tmp_path: Path, world: World) -> None:
    config = configured(tmp_path, *IMAGE, *SKIP, "--train.steps", "2")
    config.run_dir.mkdir(parents=True)
    trainer = Trainer(config, world, lambda: False)
    batches: Any = Spoilt(trainer, lambda: trainer.step == 0)
    trainer.reader.batches = batches
    assert trainer.run()["step"] == 2
    trainer.close()
    assert [line["step"] for line in metrics(config.run_dir)] == [2]


def skip_on_one_of_two(world: World, folder: Path) -> None:
    image = configured(folder, *IMAGE, *SKIP, "--name", "image")
    skips_one_step(image, world, spoil_batch)
    source = ("--data.source", str(folder / "corpus"), "--moe.router.centre", "True")
    bf16 = configured(folder, *TEXT, *SKIP, *source, "--name", "bf16")
    skips_one_step(bf16, world, spoil_gradient)
    fp32 = replace(bf16, name="fp32", train=replace(bf16.train, dtype="fp32"))
    skips_one_step(fp32, world, spoil_gradient)


@pytest.mark.distributed
def test_a_step_that_is_spoilt_on_one_rank_is_skipped_on_all(
    tmp_path: Path, two_ranks: TwoRanks
) -> None:
    write_corpus(tmp_path / "corpus")
    two_ranks(skip_on_one_of_two, tmp_path)


def test_many_skipped_steps_in_a_row_end_the_run(tmp_path: Path, world: World) -> None:
    config = configured(tmp_path, *IMAGE, *SKIP)
    config.run_dir.mkdir(parents=True)
    trainer = Trainer(config, world, lambda: False)
    batches: Any = Spoilt(trainer, lambda: trainer.step >= 2)
    trainer.reader.batches = batches
    words = r"steps up to 12: loss not finite, 10 skipped in a row; step 2 was the last good one"
    with pytest.raises(TrainingFailed, match=words):
        trainer.run()
    trainer.close()


def test_skipping_needs_an_engine_that_leaves_steps_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"zero_stage 0 with train\.on_not_finite 'skip'"):
        check(configured(tmp_path, *IMAGE, *SKIP, "--train.zero_stage", "0"))


AHEAD, BEHIND = Place(30, 7, "backward", 4), Place(29, 7, "forward", 4)


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ((AHEAD, BEHIND), (AHEAD, BEHIND), "ranks 0, 1 have not finished step 7 (forward) and"),
        ((AHEAD, BEHIND), (5, BEHIND), "rank 1 has not finished step 7 (forward) and no longer"),
        ((AHEAD, BEHIND), (5, 5), "rank 1 has not finished step 7 (forward)"),
        ((AHEAD, AHEAD), (5, 5), "ranks 0, 1 have not finished step 7 (backward)"),
        # a first step compiles, an evaluation takes as long as it does, and each has a beat
        ((AHEAD, BEHIND._replace(step=3)), (5, 5), None),
        ((AHEAD, BEHIND._replace(phase="evaluation")), (5, 5), None),
        ((AHEAD, BEHIND._replace(phase="evaluation")), (5, BEHIND), "rank 1 has not finished"),
    ],
)
def test_who_keeps_the_others_waiting(
    before: tuple[Place, ...], now: tuple[Any, ...], expected: str | None
) -> None:
    """A number is a rank's later beat in the same place."""
    places = [
        place._replace(beats=later if isinstance(later, int) else place.beats)
        for place, later in zip(before, now, strict=True)
    ]
    found = find_hang(dict(enumerate(before)), dict(enumerate(places)), first=3)
    if expected is None:
        assert found is None
    else:
        assert found is not None
        assert found.message.startswith(expected)
