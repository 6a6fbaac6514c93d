"""Whatever goes wrong, what was saved stays, and the same command goes on as if nothing had."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.testing import assert_close

from simvq_moe.config import Config
from simvq_moe.config_checks import check
from simvq_moe.data.order import StepBatches
from simvq_moe.merging import ConfigError, with_flags
from simvq_moe.training import checkpoint
from simvq_moe.training.engine import World, learning_rate_factor, start_distributed
from simvq_moe.training.faults import TrainingFailed
from simvq_moe.training.loop import Trainer
from simvq_moe.training.watchdog import Place, find_hang, read_places
from tests.launching import metrics, rank_of, start, start_tasks, stop_where, wait_until

IMAGE = (
    *("--quantizer.codes", "16", "--quantizer.width", "4", "--image_tokenizer.hidden", "4"),
    *("--quantizer.kind", "ema", "--quantizer.restart", "0.1", "--train.accumulation", "2"),
    *("--data.crops", "64", "--data.held_out_crops", "18", "--train.batch_size", "8"),
)
TEXT = (
    *("--task", "language_model", "--data.source", "corpus", "--data.vocabulary", "300"),
    *("--data.context", "16", "--language_model.width", "16", "--language_model.heads", "2"),
    *("--language_model.layers", "2", "--moe.experts", "8", "--moe.top_k", "2"),
    *("--moe.expert_parallel", "2", "--moe.balance", "loss_free", "--moe.expert_out_map", "linear"),
    *("--train.batch_size", "8", "--train.accumulation", "2", "--train.probe_tokens", "64"),
)
STEPS = ("--train.steps", "32", "--train.save_every", "4", "--train.log_every", "3")
TASKS = {"image": (*IMAGE, *STEPS), "text": (*TEXT, *STEPS)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a small corpus."""
    root = tmp_path_factory.mktemp("faults")
    (root / "corpus").mkdir()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        (root / "corpus" / file.name).write_text(file.read_text())
    return root


def train(folder: Path, name: str, *flags: str) -> tuple[list[int], list[str]]:
    """Exit codes and standard errors of two ranks, to their end."""
    tasks = start_tasks("train", "--name", name, *flags, cwd=folder)
    errors = [task.communicate(timeout=600)[1] for task in tasks]
    return [task.returncode for task in tasks], errors


def whole(folder: Path, task: str) -> Path:
    """The undisturbed run of a task."""
    run_dir = folder / "runs" / f"whole_{task}"
    if not run_dir.exists():
        codes, errors = train(folder, run_dir.name, *TASKS[task])
        assert codes == [0, 0], errors
    return run_dir


def weights(run_dir: Path) -> dict[str, Tensor]:
    step = (run_dir / "checkpoints" / "latest").read_text()
    return checkpoint.load_weights(run_dir / "checkpoints" / step)


def assert_same(run_dir: Path, undisturbed: Path) -> None:
    """Both runs left the same numbers, to the bit."""
    assert metrics(run_dir) == metrics(undisturbed)
    with np.load(run_dir / "usage.npz") as a, np.load(undisturbed / "usage.npz") as b:
        for key in b:
            np.testing.assert_array_equal(a[key], b[key])
    assert_close(weights(run_dir), weights(undisturbed), rtol=0, atol=0)


def goes_on(folder: Path, name: str, task: str, saved: int) -> None:
    """The same command goes on from what was saved, and ends as the undisturbed run."""
    codes, errors = train(folder, name, *TASKS[task])
    assert codes == [0, 0], errors
    assert f"resuming runs/{name} at step {saved}" in errors[0]
    assert_same(folder / "runs" / name, whole(folder, task))


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


@pytest.mark.distributed
@pytest.mark.parametrize(("task", "rank", "when"), [("text", 1, "step"), ("image", 0, "save")])
def test_a_run_whose_rank_is_killed_goes_on_as_if_nothing_had_happened(
    folder: Path, task: str, rank: int, when: str
) -> None:
    name = f"killed_in_{when}"
    run_dir = folder / "runs" / name
    launcher = start("train", "--name", name, *TASKS[task], cwd=folder, ranks=2)
    victim = rank_of(launcher, rank)
    stop_where(victim, in_step(run_dir, rank, 9) if when == "step" else in_save(run_dir, 4))
    saved = checkpoint.committed_steps(run_dir / "checkpoints")
    victim.kill()
    launcher.communicate(timeout=600)
    assert launcher.returncode == 1
    # another rank may have renamed what was whole
    after = checkpoint.latest_step(run_dir / "checkpoints")
    assert after is not None
    assert 4 <= saved[-1] <= after < 32
    goes_on(folder, name, task, after)


@pytest.mark.distributed
def test_a_preempted_job_is_saved_by_all_its_tasks_and_goes_on(folder: Path) -> None:
    run_dir = folder / "runs" / "preempted"
    tasks = start_tasks("train", "--name", "preempted", *TASKS["text"], cwd=folder)
    wait_until(tasks[0], in_step(run_dir, 0, 5))
    # all agree to stop when one is told
    tasks[1].send_signal(signal.SIGTERM)
    errors = [task.communicate(timeout=600)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [130, 130], errors
    saved = checkpoint.latest_step(run_dir / "checkpoints")
    assert saved is not None
    assert f"runs/preempted: stopped at step {saved}, which is saved" in errors[0]
    goes_on(folder, "preempted", "text", saved)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("what", "rank", "flags", "words"),
    [
        ("checkpoint", 1, ("--train.log_every", "90"), "tmp/model_1.safetensors could not be"),
        ("records", 0, ("--train.save_every", "12"), "records of runs/no_records could not be"),
    ],
)
def test_a_full_disk_ends_all_ranks_with_one_line_and_loses_nothing(
    folder: Path, what: str, rank: int, flags: tuple[str, ...], words: str
) -> None:
    name = f"no_{what}"
    run_dir = folder / "runs" / name
    flags = (*TASKS["text"], "--train.eval_every", "90", *flags)
    tasks = start_tasks("train", "--name", name, *flags, cwd=folder)
    wait_until(tasks[rank], in_step(run_dir, rank, 13))
    # no file of this rank may grow beyond 1 kB from now on
    resource.prlimit(tasks[rank].pid, resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    errors = [task.communicate(timeout=600)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [1, 1], errors
    newest = checkpoint.latest_step(run_dir / "checkpoints")
    assert newest is not None
    assert newest >= 12
    line = errors[0].strip().splitlines()[-1]
    assert words in line
    assert "File too large" in line
    assert f"(newest: checkpoint runs/{name}/checkpoints/{newest}); make room" in line
    assert "Traceback" not in errors[0] + errors[1]
    assert not list((run_dir / "checkpoints").glob("*.tmp"))
    codes, errors = train(folder, name, *flags)
    assert codes == [0, 0], errors
    steps = [line["step"] for line in metrics(run_dir)]
    assert steps == sorted(set(steps))
    assert_close(weights(run_dir), weights(whole(folder, "text")), rtol=0, atol=0)


@pytest.mark.distributed
def test_a_rank_that_hangs_ends_the_run_by_name_and_place(folder: Path) -> None:
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
    saved = checkpoint.latest_step(run_dir / "checkpoints")
    assert saved is not None
    goes_on(folder, "hung", "text", saved)


@pytest.mark.distributed
def test_a_finished_run_that_is_given_more_steps_is_the_longer_run(folder: Path) -> None:
    flags, run_dir = TASKS["image"], folder / "runs" / "extended"
    codes, errors = train(folder, "extended", *flags, "--train.steps", "12")
    assert codes == [0, 0], errors
    codes, errors = train(folder, "extended", *flags, "--train.steps", "9")
    assert codes == [2, 2]
    assert "train.steps was 12 and is now 9" in errors[0]
    codes, errors = train(folder, "extended", *flags)
    assert codes == [0, 0], errors
    assert "runs/extended is given 32 steps in place of 12" in errors[0]
    longer = whole(folder, "image")
    assert_close(weights(run_dir), weights(longer), rtol=0, atol=0)
    # but for the evaluation at what was the last step
    lines = [line if line["step"] != 12 else {} for line in metrics(run_dir)]
    assert lines == [line if line["step"] != 12 else {} for line in metrics(longer)]


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
        trainer._update()
    trainer._save()
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
        self.reader, self.spoils = trainer.reader, spoils

    def __next__(self) -> StepBatches:
        found = next(self.reader)
        if not self.spoils():
            return found
        return found._replace(micro_batches=[batch * torch.nan for batch in found.micro_batches])

    def close(self) -> None:
        self.reader.close()


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """All that training changes: weights and moments as they are saved, and every buffer."""
    from simvq_moe.training import engine_state

    found = {f"buffer/{name}": b.clone() for name, b in trainer.task.model.named_buffers()}
    for whole in engine_state.whole_tensors(trainer.engine):
        found[whole.name] = whole.weight.clone()
        found |= {f"{m}/{whole.name}": moment.clone() for m, moment in whole.moments.items()}
    return found


def skips_one_step(config: Config, world: World, spoil: Callable[[Trainer], Any]) -> None:
    """Step 3 is spoilt and leaves all as it was; the run goes on, and may be resumed."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config, world, lambda: False)
    spoil(trainer)
    states = []
    for step in (1, 2, 3, 4):
        trainer._update()
        trainer._save()
        states.append(state_of(trainer))
        assert trainer.step == step
    assert_close(states[2], states[1], rtol=0, atol=0)
    assert any(not torch.equal(states[3][name], states[2][name]) for name in states[2])
    assert all(bool(tensor.isfinite().all()) for tensor in states[3].values())
    assert trainer._write_log(None)["train/skipped_steps"] == 1
    trainer._save()
    trainer.close()
    again = Trainer(config, world, lambda: False)
    again.close()
    assert again.resumed_from == 4
    assert again.engine.skipped_steps == 1


def spoil_batch(trainer: Trainer) -> None:
    """The last rank reads NaN in step 3."""
    here = trainer.world.rank == trainer.world.size - 1
    reader: Any = Spoilt(trainer, lambda: here and trainer.step == 2)
    trainer.reader = reader


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
    restart = "0" if kind == "simvq" else "0.9"
    flags = (*IMAGE, *SKIP, "--quantizer.kind", kind, "--quantizer.restart", restart)
    skips_one_step(configured(tmp_path, *flags), world, spoil_batch)
    assert "step 3 is skipped: loss not finite (1 so far)" in caplog.text


def test_a_first_step_that_is_skipped_can_be_saved(tmp_path: Path, world: World) -> None:
    config = configured(tmp_path, *IMAGE, *SKIP, "--train.steps", "2")
    config.run_dir.mkdir(parents=True)
    trainer = Trainer(config, world, lambda: False)
    reader: Any = Spoilt(trainer, lambda: trainer.step == 0)
    trainer.reader = reader
    assert trainer.run()["step"] == 2
    trainer.close()
    assert [line["step"] for line in metrics(config.run_dir)] == [2]


def skip_on_one_of_two(rank: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    store = (folder / "store").as_uri()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    world = start_distributed()
    os.chdir(folder)
    image = configured(folder, *IMAGE, *SKIP, "--name", "image")
    skips_one_step(image, world, spoil_batch)
    text = configured(folder, *TEXT, *SKIP, "--moe.centre_router_input", "True", "--name", "text")
    skips_one_step(text, world, spoil_gradient)
    bf16 = replace(text, name="bf16", train=replace(text.train, dtype="bf16"))
    skips_one_step(bf16, world, spoil_gradient)
    dist.destroy_process_group()


@pytest.mark.distributed
def test_a_step_that_is_spoilt_on_one_rank_is_skipped_on_all(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        (tmp_path / "corpus" / file.name).write_text(file.read_text())
    spawn(skip_on_one_of_two, args=(tmp_path,), nprocs=2)


def test_many_skipped_steps_in_a_row_end_the_run(tmp_path: Path, world: World) -> None:
    config = configured(tmp_path, *IMAGE, *SKIP)
    config.run_dir.mkdir(parents=True)
    trainer = Trainer(config, world, lambda: False)
    reader: Any = Spoilt(trainer, lambda: trainer.step >= 2)
    trainer.reader = reader
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
