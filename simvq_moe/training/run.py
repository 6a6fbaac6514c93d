"""One run from its config to its exit code: folder, records, status, signals."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from simvq_moe.config import Config, without_other_tasks
from simvq_moe.config_checks import check, check_ranks
from simvq_moe.config_checks_moe import with_gates
from simvq_moe.data.streaming import TextStream
from simvq_moe.merging import ConfigError, first_difference, mapping_to_yaml, merge_files, to_yaml
from simvq_moe.training import checkpoint
from simvq_moe.training.cluster import fitting_gpus, read_cluster
from simvq_moe.training.codes_task import fit_to_codes
from simvq_moe.training.dry_run import estimate
from simvq_moe.training.engine import (
    World,
    import_deepspeed,
    launched_rank,
    launched_ranks,
    start_distributed,
)
from simvq_moe.training.engine_settings import check_device, engine_settings
from simvq_moe.training.faults import (
    Interrupted,
    TrainingFailed,
    WriteFailed,
    is_lost_rank,
    writing,
)
from simvq_moe.training.image_measures import check_networks
from simvq_moe.training.logs import write_json, write_text
from simvq_moe.training.loop import Trainer
from simvq_moe.training.slurm import adopt_slurm
from simvq_moe.training.tasks import check_source

FINISHED, FAILED, INTERRUPTED = 0, 1, 130
"""Exit codes; 2 is a `ConfigError`."""
PACKAGES = ("simvq-moe", "torch", "deepspeed", "tokenizers", "datasets", "numpy")


def train(config: Config) -> int:
    """Run or resume the config in its folder; the exit code.

    Raises:
        ConfigError: the config can't run here; nothing was written.
    """
    adopt_slurm(os.environ)
    config = with_gates(fit_to_codes(config))
    main = launched_rank() == 0
    check_launch(config, launched_ranks())
    check_device(config)
    before = _steps_before(config)
    if is_finished(config) and before in (None, config.train.steps):
        if main:
            print(f"{config.run_dir} is finished: nothing to do", file=sys.stderr)
        return FINISHED
    new = not config.run_dir.exists()
    config.run_dir.mkdir(parents=True, exist_ok=True)
    try:
        with _signals() as stop_asked, _alone_in(config.run_dir, main):
            if main:
                _begin(config, before)
            with _noise_to(config.run_dir / "log.txt", visible=main):
                return _run(config, stop_asked)
    except WriteFailed as failure:
        print(f"{config.run_dir}: {failure}", file=sys.stderr)
        return FAILED
    except ConfigError:
        # found out only with the data at hand; the corrected config may take the same name
        if main and new:
            shutil.rmtree(config.run_dir)
        raise


def check_launch(config: Config, world_size: int) -> None:
    """Raise `ConfigError` for whatever would keep this config from running on so many ranks."""
    config = with_gates(fit_to_codes(config))
    _check_settings(config, world_size)
    _check_files(config)


def _check_settings(config: Config, world_size: int) -> None:
    """What the config alone says."""
    check(config)
    check_ranks(config, world_size)
    engine_settings(config, world_size)


def _check_files(config: Config) -> None:
    """What must be here: data, networks of measures, and no other run in the folder."""
    check_source(config)
    check_networks(config)
    saved = config.run_dir / "config.yaml"
    if saved.is_file():
        difference = first_difference(_laid_out_as(config, merge_files(Config, [saved])), config)
        if difference:
            raise ConfigError(
                f"{config.run_dir} holds a run of another config ({difference}): "
                "give this run another --name, or remove that folder"
            )
        if not is_finished(config):
            checkpoint.check_form(config.run_dir / "checkpoints")


FREE_TO_CHANGE = (
    *("zero_stage", "activation_checkpointing", "compile", "profile", "peak_flops"),
    *("log_every", "eval_every", "save_every", "keep_checkpoints", "keep_every"),
    *("on_not_finite", "timeout_s"),
)
"""Keys of `train` that change, when a run goes on, where numbers lie, how they are computed and how
often they are looked at, but not what they are."""


def _laid_out_as(new: Config, old: Config) -> Config:
    """old, with what a run may change when it goes on as in new, and more steps as well."""
    kept = {name: getattr(new.train, name) for name in FREE_TO_CHANGE}
    steps = max(old.train.steps, new.train.steps)
    # how data are read is free as well, so that a run may go on past broken ones
    data = replace(old.data, prefetch=new.data.prefetch, on_corrupt=new.data.on_corrupt)
    return replace(
        old,
        data=data,
        moe=replace(old.moe, expert_parallel=new.moe.expert_parallel),
        train=replace(old.train, steps=steps, **kept),
    )


def _steps_before(config: Config) -> int | None:
    """Steps that the folder's run was to have; None: there is none."""
    saved = config.run_dir / "config.yaml"
    return merge_files(Config, [saved]).train.steps if saved.is_file() else None


def _begin(config: Config, before: int | None) -> None:
    """Write down what is trained; a run that is given more steps is not finished."""
    steps = config.train.steps
    if before is not None and before < steps:
        print(
            f"{config.run_dir} is given {steps} steps in place of {before}: it goes on from its "
            "last checkpoint, and from there the learning rate is that of the longer run",
            file=sys.stderr,
        )
    with writing(config.run_dir):
        if before != steps:
            (config.run_dir / "summary.json").unlink(missing_ok=True)
        write_text(config.run_dir / "config.yaml", to_yaml(config))


def dry_run(config: Config, cluster_file: Path | None = None) -> int:
    """Print the resolved config and what the run would cost, the costs on standard output as JSON;
    write nothing. Data that are not here are said, and not needed.

    Args:
        cluster_file: YAML of the machines to predict the step time on.
    """
    config = with_gates(fit_to_codes(config))
    check(config)
    cluster = None if cluster_file is None else read_cluster(cluster_file)
    ranks = launched_ranks() if cluster is None else fitting_gpus(config, cluster)[-1]
    _check_settings(config, ranks)
    text, costs = estimate(config, ranks, cluster)
    try:
        _check_files(config)
    except ConfigError as error:
        text += f"\n! would not start here: {error}"
    print(mapping_to_yaml(without_other_tasks(config)), text, sep="\n", file=sys.stderr)
    print(json.dumps(costs))
    return FINISHED


def is_finished(config: Config) -> bool:
    """Whether the run's folder holds its final numbers."""
    return (config.run_dir / "summary.json").is_file()


def _run(config: Config, stop_asked: Callable[[], bool]) -> int:
    started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    world = start_distributed(config.train.timeout_s)
    meta = _meta(config, world) | {"started": started}
    before, now = _ranks_before(config), _ranks_of(meta)
    _write_meta(config, world, meta | {"status": "running", "error": None})
    status, error, code = "finished", None, FINISHED
    summary: dict[str, float] = {}
    try:
        trainer = Trainer(config, world, stop_asked)
        if world.is_main:  # only now, so that what is wrong with the data stands alone
            print(mapping_to_yaml(without_other_tasks(config)), file=sys.stderr)
        meta |= _describe(trainer)
        _write_meta(config, world, meta | {"status": "running", "error": None})
        if world.is_main and trainer.resumed_from:
            where = f"{config.run_dir} at step {trainer.resumed_from}"
            if before not in (None, now):
                where += f" on {now}, not to the bit: it was on {before}"
            print(f"resuming {where}", file=sys.stderr)
        with contextlib.closing(trainer):
            summary = trainer.run()
        if world.is_main:
            _write_summary(config, summary)
    except Interrupted as stop:
        status, error, code = "interrupted", str(stop), INTERRUPTED
    except TrainingFailed as failure:
        status, error, code = "failed", str(failure), FAILED
    except Exception as failure:
        lost = is_lost_rank(failure)
        error = traceback.format_exc().strip().splitlines()[-1]
        if lost:
            error = _without_a_rank(config, world)
            print(f"{config.run_dir}: {error}", file=sys.stderr)
        with contextlib.suppress(WriteFailed):
            _write_meta(config, world, meta | {"status": "failed", "error": error})
        if not lost:
            raise
        return FAILED  # with no call that the lost rank would have to answer
    with contextlib.suppress(WriteFailed):
        _write_meta(config, world, meta | {"status": status, "error": error})
    if world.is_main:
        print(f"{config.run_dir}: {error or describe_result(summary)}", file=sys.stderr)
    world.barrier()
    dist.destroy_process_group()
    return code


def _without_a_rank(config: Config, world: World) -> str:
    """What a run that has lost a rank says."""
    newest = checkpoint.latest_step(config.run_dir / "checkpoints")
    saved = "no checkpoint yet" if newest is None else f"newest checkpoint: step {newest}"
    return f"rank {world.rank}: another rank has ended ({saved}); the same command goes on"


def _ranks_before(config: Config) -> str | None:
    """What `_ranks_of` says of the run so far; None: it is new, or has no whole meta.json."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        return _ranks_of(json.loads((config.run_dir / "meta.json").read_text()))
    return None


def _ranks_of(meta: Mapping[str, Any]) -> str:
    """What the last bits of a CPU's sums depend on."""
    return f"{meta['world_size']} x {meta['threads']} threads"


def _write_summary(config: Config, summary: Mapping[str, float]) -> None:
    path = config.run_dir / "summary.json"
    try:
        with writing(path):
            write_json(path, {"status": "finished", **summary})
    except WriteFailed as failure:
        raise TrainingFailed(f"{failure}; make room, and give the same command again") from failure


def describe_result(summary: Mapping[str, float]) -> str:
    """A finished run in one line."""
    shown = ("val/loss", "val/bits_per_byte", "val/bits_per_code", "val/psnr")
    shown += ("val/codes/used", "val/codes/perplexity", "val/moe/mean/used", "val/moe/mean/entropy")
    parts = [f"{name} {summary[name]:.4g}" for name in shown if name in summary]
    return ", ".join(["finished", *parts])


def _meta(config: Config, world: World) -> dict[str, Any]:
    cuda = world.device.type == "cuda"
    arguments = [arg for arg in sys.argv[1:] if not arg.startswith("--local_rank")]
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "task": config.task,
        "arm": config.arm or config.name,
        "seed": config.seed,
        "command": shlex.join(["simvq-moe", *arguments]),
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **versions},
        "device": torch.cuda.get_device_name(world.device) if cuda else _processor(),
        "world_size": world.size,
        "threads": torch.get_num_threads(),
    }


def _describe(trainer: Trainer) -> dict[str, Any]:
    train = trainer.task.train
    return {
        "layers": [vars(layer) for layer in trainer.layers],
        "banks": trainer.banks.names,
        **trainer.cost,
        "samples": {
            "train": None if isinstance(train, TextStream) else len(train),
            "held_out": len(trainer.task.held_out),
        },
        "tokens_per_sample": trainer.task.tokens_per_sample,
    }


def _write_meta(config: Config, world: World, meta: dict[str, Any]) -> None:
    if world.is_main:
        with writing(config.run_dir / "meta.json"):
            write_json(config.run_dir / "meta.json", meta)


def _commit() -> str | None:
    """The commit of the checkout that this package runs from, if it is one."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@contextlib.contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """SIGINT and SIGTERM are remembered, so that the loop stops after a whole step."""
    received: list[int] = []
    handled = (signal.SIGINT, signal.SIGTERM)
    before = {s: signal.signal(s, lambda number, _: received.append(number)) for s in handled}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _alone_in(run_dir: Path, main: bool) -> Iterator[None]:
    """Two launches in one folder would overwrite each other; the lock ends with the process."""
    if not main:
        yield
        return
    with (run_dir / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another process is training in {run_dir}: wait for it, or give another --name"
            ) from None
        yield


@contextlib.contextmanager
def _noise_to(file: Path, *, visible: bool) -> Iterator[None]:
    """What libraries print, log and warn of goes to a file; our own warnings also to the user."""
    with file.open("a", buffering=1) as log, contextlib.redirect_stdout(log):
        handler = logging.StreamHandler(log)
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
        root, ours = logging.getLogger(), logging.getLogger("simvq_moe")
        console = logging.StreamHandler(sys.stderr)
        console.setLevel(logging.WARNING)
        ours.setLevel(logging.INFO)
        root.addHandler(handler)
        if visible:
            ours.addHandler(console)
        logging.captureWarnings(True)
        # deepspeed's logger has its own handler on standard output
        deepspeed_logger = import_deepspeed().utils.logger
        before = deepspeed_logger.handlers[:]
        deepspeed_logger.handlers[:] = [handler]
        try:
            yield
        finally:
            deepspeed_logger.handlers[:] = before
            logging.captureWarnings(False)
            root.removeHandler(handler)
            ours.removeHandler(console)
