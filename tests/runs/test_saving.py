"""With `async_save` a run goes on while it is saved, and what it saves is what it was."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor
from torch.testing import assert_close

from simvq_moe.config.flags import with_flags
from simvq_moe.config.schema import Config
from simvq_moe.engine.agreement import Interrupted, TrainingFailed
from simvq_moe.engine.world import World
from simvq_moe.runs import checkpoint
from simvq_moe.runs.chunks import read_whole
from simvq_moe.training.loop import Trainer
from tests.launching import metrics
from tests.two_ranks import TwoRanks

STEPS = 4
TINY = (
    *("--quantizer.codes", "16", "--quantizer.width", "4", "--image_tokenizer.hidden", "4"),
    *("--data.crops", "64", "--data.held_out_crops", "18", "--train.batch_size", "4"),
    *("--train.save_every", "1", "--train.probe_tokens", "0", "--train.steps", str(STEPS)),
    *("--train.log_every", "1", "--train.eval_every", str(STEPS), "--quantizer.kind", "ema"),
)


def configured(folder: Path, name: str, *, async_save: bool) -> Config:
    where = ("--data.cache_dir", str(folder / "cache"), "--runs_dir", str(folder), "--name", name)
    config = with_flags(Config(), (*TINY, *where), "train")
    config.run_dir.mkdir(parents=True, exist_ok=True)
    return replace(config, train=replace(config.train, async_save=async_save))


def tensors(config: Config, step: int) -> dict[str, Tensor]:
    saved = config.run_dir / "checkpoints" / str(step)
    return dict(read_whole(saved, checkpoint.read_index(saved).tensors))


def finish(config: Config, world: World) -> int:
    """Train to the end; the step that this began with."""
    trainer = Trainer(config, world, lambda: False)
    try:
        trainer.run()
    finally:
        trainer.close()
    return trainer.resumed_from


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, world: World) -> Config:
    """A run whose steps wait for each save."""
    config = configured(tmp_path_factory.mktemp("saving"), "whole", async_save=False)
    keeps = replace(config, train=replace(config.train, keep_checkpoints=STEPS))
    assert finish(keeps, world) == 0
    return keeps


@contextmanager
def busy_writer(trainer: Trainer) -> Iterator[None]:
    """What writes checkpoints has something else to do until the end of the block."""
    over = threading.Event()
    assert trainer.saves.thread is not None
    trainer.saves.thread.submit(over.wait, 60)
    try:
        yield
    finally:
        over.set()


def test_a_step_that_is_saved_while_later_ones_are_trained_is_what_it_was(
    undisturbed: Config, world: World
) -> None:
    config = configured(undisturbed.run_dir.parent, "aside", async_save=True)
    trainer = Trainer(config, world, lambda: False)
    trainer.update()
    trainer.write_log()
    with busy_writer(trainer):
        trainer.save(wait=False)
        trainer.update()
        trainer.update()
        assert checkpoint.latest_step(trainer.checkpoints) is None
    trainer.close()
    assert checkpoint.committed_steps(trainer.checkpoints) == [1]
    assert_close(tensors(config, 1), tensors(undisturbed, 1), rtol=0, atol=0)
    # and the run that goes on from there is the undisturbed one
    assert finish(config, world) == 1
    assert_close(tensors(config, STEPS), tensors(undisturbed, STEPS), rtol=0, atol=0)
    assert metrics(config.run_dir) == metrics(undisturbed.run_dir)


def test_a_save_waits_for_the_one_before(undisturbed: Config, world: World) -> None:
    config = configured(undisturbed.run_dir.parent, "in_turn", async_save=True)
    trainer = Trainer(config, world, lambda: False)
    trainer.update()
    with busy_writer(trainer):
        trainer.save(wait=False)
    trainer.update()
    trainer.save(wait=False)
    assert 1 in checkpoint.committed_steps(trainer.checkpoints)
    trainer.close()
    assert checkpoint.committed_steps(trainer.checkpoints) == [1, 2]


def test_a_run_that_is_asked_to_stop_waits_for_its_save(undisturbed: Config, world: World) -> None:
    config = configured(undisturbed.run_dir.parent, "asked", async_save=True)
    trainer = Trainer(config, world, lambda: True)
    assert trainer.saves.thread is not None
    trainer.saves.thread.submit(time.sleep, 0.2)
    with pytest.raises(Interrupted, match="stopped at step 1, which is saved"):
        trainer.run()
    assert checkpoint.latest_step(trainer.checkpoints) == 1
    trainer.close()


def fails_on_the_last_rank(world: World, folder: Path) -> str:
    """What a run says whose last rank has no room for its second checkpoint, and does not wait."""
    config = configured(folder, f"full_{world.size}", async_save=True)
    trainer = Trainer(config, world, lambda: False)
    trainer.update()
    trainer.save()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        trainer.update()
        if world.rank == world.size - 1:  # no file may grow beyond so many bytes
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, before[1]))
        trainer.save(wait=False)
        trainer.saves.settle()
        trainer.update()
    except TrainingFailed as failure:
        return str(failure)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        trainer.close()
    raise AssertionError("nobody has said anything")


def assert_first_is_kept(said: str, checkpoints: Path) -> None:
    ends = f"(newest: checkpoint {checkpoints / '1'}); make room, and the same command goes on"
    assert said.endswith(ends)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["1", "latest"]


def test_what_can_not_be_saved_ends_the_run_at_the_next_step(tmp_path: Path, world: World) -> None:
    said = fails_on_the_last_rank(world, tmp_path)
    assert said.startswith("stopped at step 2: ")
    assert "2.tmp/model_0.safetensors could not be written: File too large" in said
    assert_first_is_kept(said, tmp_path / "full_1" / "checkpoints")


@pytest.mark.distributed
def test_what_one_rank_can_not_save_ends_all(tmp_path: Path, two_ranks: TwoRanks) -> None:
    first, second = two_ranks(fails_on_the_last_rank, tmp_path)
    for said in (first, second):
        assert said.startswith("stopped at step 2: rank 1: ")
        assert "2.tmp/model_1.safetensors could not be written: File too large" in said
    assert_first_is_kept(first, tmp_path / "full_2" / "checkpoints")


def both_ways(world: World, folder: Path) -> list[int]:
    """A run that waits for its saves; one that does not, whose first half is a run of its own."""
    finish(configured(folder, "waits", async_save=False), world)
    config = configured(folder, "goes_on", async_save=True)
    trainer = Trainer(config, world, lambda: False)
    for _ in range(2):
        trainer.update()
        trainer.write_log()
        trainer.save(wait=False)
    trainer.close()
    return [finish(config, world)]


@pytest.mark.distributed
def test_two_ranks_that_go_on_while_they_are_saved_train_the_same_to_the_bit(
    tmp_path: Path, two_ranks: TwoRanks
) -> None:
    assert two_ranks(both_ways, tmp_path) == [[2], [2]]
    waits, goes_on = (configured(tmp_path, name, async_save=False) for name in ("waits", "goes_on"))
    assert metrics(goes_on.run_dir) == metrics(waits.run_dir)
    for step in (STEPS - 1, STEPS):
        assert_close(tensors(goes_on, step), tensors(waits, step), rtol=0, atol=0)
