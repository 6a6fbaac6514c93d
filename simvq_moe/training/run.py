"""`train`: one run from its config to its exit code."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable

import torch.distributed as dist

from simvq_moe.config.schema import Config
from simvq_moe.engine.agreement import (
    Interrupted,
    TrainingFailed,
    WriteFailed,
    is_lost_rank,
    is_out_of_memory,
    writing,
)
from simvq_moe.engine.launched import check_launched, launched_rank, launched_ranks
from simvq_moe.engine.settings import check_device
from simvq_moe.engine.slurm import adopt_slurm
from simvq_moe.engine.world import World, start_distributed
from simvq_moe.errors import FAILED, FINISHED, INTERRUPTED, ConfigError
from simvq_moe.files.of_runs import CHECKPOINTS
from simvq_moe.runs import checkpoint
from simvq_moe.runs.folder import check_shared, log_file
from simvq_moe.training.loop import Trainer
from simvq_moe.training.meta import RunMeta, describe_result, write_summary
from simvq_moe.training.preflight import Preflight, check_settings, prepare, resolved
from simvq_moe.training.process import noise_to_file, stop_signals


def train(config: Config) -> int:
    """Run or resume the config in its folder; the exit code.

    Raises:
        ConfigError: the config can't run here; nothing was written.
    """
    adopt_slurm(os.environ)
    check_launched(os.environ)
    config = resolved(config)
    check_settings(config, launched_ranks())
    check_device(config)
    with stop_signals() as stop_asked, contextlib.ExitStack() as held:
        # a rank that is refused tells the others, which would wait for it; alone it says so at once
        run = prepare(config, held) if launched_ranks() == 1 else None
        if run is not None and run.finished:
            return FINISHED
        with noise_to_file(visible=launched_rank() == 0) as noise:
            world = start_distributed(config.train.timeout_s)
            run = run or world.agree(lambda: prepare(config, held))
            finished, mark = world.gather((run.finished, run.folder and run.folder.mark))[0]
            if finished:
                return FINISHED
            world.agree(lambda: check_shared(config.run_dir, mark or ""))
            try:
                log = log_file(config.run_dir, world.rank)
                with writing(log):
                    log.parent.mkdir(exist_ok=True)
                    noise.begin(log)
                return _run(run, world, stop_asked)
            except WriteFailed as failure:
                print(f"{config.run_dir}: {failure}", file=sys.stderr)
                return FAILED


def _run(run: Preflight, world: World, stop_asked: Callable[[], bool]) -> int:
    config, meta = run.config, RunMeta(run, world)
    status, error, code = "finished", None, FINISHED
    summary: dict[str, float] = {}
    try:
        trainer = Trainer(config, world, stop_asked, meta.begin)
        with contextlib.closing(trainer):
            summary = trainer.run()
        if world.is_main:
            write_summary(config, summary)
    except Interrupted as stop:
        status, error, code = "interrupted", str(stop), INTERRUPTED
    except TrainingFailed as failure:
        status, error, code = "failed", str(failure), FAILED
    except ConfigError as refusal:
        if meta.begun:
            meta.end("failed", str(refusal))
        raise
    except Exception as failure:
        lost = is_lost_rank(failure)
        error = traceback.format_exc().strip().splitlines()[-1]
        told = lost or is_out_of_memory(failure)
        if told:
            error = (_without_a_rank if lost else _out_of_memory)(config, world)
            print(f"{config.run_dir}: {error}", file=sys.stderr)
        meta.end("failed", error)
        if not told:
            raise
        return FAILED  # with no call that the lost rank would have to answer
    meta.end(status, error)
    if world.is_main:
        print(f"{config.run_dir}: {error or describe_result(summary)}", file=sys.stderr)
    world.barrier()
    dist.destroy_process_group()
    return code


def _without_a_rank(config: Config, world: World) -> str:
    """What a run that has lost a rank says."""
    newest = _newest(config)
    return f"rank {world.rank}: another rank has ended ({newest}); the same command goes on"


def _out_of_memory(config: Config, world: World) -> str:
    """What a run says that asked for more memory than there is."""
    train = config.train
    return (
        f"rank {world.rank}: {world.device.type} is out of memory ({_newest(config)}): raise "
        f"train.accumulation {train.accumulation} or lower train.batch_size {train.batch_size}; "
        "`train --dry-run` says what takes how much"
    )


def _newest(config: Config) -> str:
    """Every rank may say so, and none reads a checkpoint for it."""
    steps = checkpoint.committed_steps(config.run_dir / CHECKPOINTS)
    return f"newest checkpoint: step {steps[-1]}" if steps else "no checkpoint yet"
