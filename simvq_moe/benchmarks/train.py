"""Our training loop against others with the same data and a model of the same shape.

On one thread, the best of several rounds; time is CPU seconds (wall time on a GPU) a step. A bare
PyTorch loop of our model is the limit: batch, forward, backward, clip, AdamW, interleaved with ours
in one process. What our loop does beside that, the DeepSpeed engine, usage counts, the watch for
losses that are not finite, logs, is what it takes over 1.00. No loop can beat the model's matrix
products, counted at the speed of one large product that is measured in the same rounds.
`transformers`' Trainer trains a Mixtral of the same shape in a process of its own; it needs
`accelerate`. Ranks are processes of one thread each, and the global batch stays the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes

from simvq_moe.benchmarks.ranks import on_ranks
from simvq_moe.benchmarks.timing import best_of_rounds, installed, seconds
from simvq_moe.config.checks import check
from simvq_moe.config.schema import (
    Config,
    LanguageModelConfig,
    MoEConfig,
    OptimizerConfig,
    TrainConfig,
)
from simvq_moe.data.text.streaming import TextStream
from simvq_moe.engine.world import World
from simvq_moe.errors import ConfigError
from simvq_moe.models.language_model import LanguageModel
from simvq_moe.moe.expert_kinds import SwiGLUExpert
from simvq_moe.tasks.base import DataSet
from simvq_moe.tasks.registry import build_model, task_of
from simvq_moe.tasks.sequences import SequenceTask
from simvq_moe.text_table import markdown
from simvq_moe.training.loop import Trainer

OURS, BARE, TRANSFORMERS = "simvq-moe train", "bare PyTorch loop", "transformers Trainer, Mixtral"
PRODUCTS = "the step's matrix products alone"
SIDE = 1024
"""Rows and columns of the product at whose speed they are counted."""
ENDLESS = 1_000_000
"""Steps of a run that is never finished."""


def config_of(width: int, heads: int, layers: int, experts: int, top_k: int, hidden: int) -> Config:
    """A language model whose blocks a Mixtral has as well, at 2,048 tokens a step."""
    return Config(
        task="language_model",
        name="bench_train",
        language_model=LanguageModelConfig(width=width, heads=heads, layers=layers),
        moe=MoEConfig(experts=experts, top_k=top_k, hidden=hidden, expert=SwiGLUExpert()),
        optimizer=OptimizerConfig(warmup_steps=0),
        train=TrainConfig(batch_size=16, clip=1.0, probe_tokens=0),
    )


SHAPES = [config_of(64, 4, 3, 64, 4, 16), config_of(256, 4, 4, 16, 2, 256)]
"""The language quickstart's, of many small experts, and one of fewer and larger ones."""


@dataclass(frozen=True)
class MeasuredLoop:
    """One loop with one shape."""

    shape: str
    name: str
    ranks: int
    seconds: float
    """CPU seconds a step, of the busiest rank; on a GPU wall time."""
    tokens_per_s: float
    """Tokens a second of all ranks, each with a core of its own: those of a step over `seconds`."""
    relative: float
    """Speed over that of the bare loop; that of several ranks over one rank."""
    wall_seconds: float | None = None
    """Seconds of a step of several ranks on this machine."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def bench_train(
    shapes: list[Config], world: World, *, steps: int = 10, rounds: int = 3, ranks: int = 2
) -> list[MeasuredLoop]:
    """Measure every loop that is installed with every shape, and ours on several ranks.

    Args:
        world: this process, alone.
        steps: optimizer steps of a round, with one line of the log.
        ranks: 1: no processes are started.

    Raises:
        ConfigError: a shape that can't be trained, or is no language model.
    """
    for config in shapes:
        check_shape(config, "bench train")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    results: list[MeasuredLoop] = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            for i, config in enumerate(shapes):
                runs = replace(config, runs_dir=str(Path(folder) / str(i)))
                results += _loops(runs, world, steps, rounds)
                results += _on_ranks(runs, ranks, steps) if ranks > 1 else []
    finally:
        torch.set_num_threads(threads)
    return results


def with_swiglu(config: Config) -> Config:
    """The config with the expert of a Mixtral, beside which it is measured."""
    return replace(config, moe=replace(config.moe, expert=SwiGLUExpert()))


def check_shape(config: Config, command: str) -> None:
    """Raise `ConfigError` for what the command can't measure: no language model, or a wrong one."""
    check(config)
    if not issubclass(task_of(config), SequenceTask):
        raise ConfigError(f"task {config.task!r}: {command} needs 'language_model'")


def train_table(results: list[MeasuredLoop]) -> str:
    """A Markdown table of the results."""
    rows = [["shape", "loop", "ms a step", "tokens/s", "times"]]
    for r in results:
        wall = "" if r.wall_seconds is None else f", {1e3 * r.wall_seconds:.0f} ms wall"
        ranks = "" if r.wall_seconds is None else f", {r.ranks} rank{'s' if r.ranks > 1 else ''}"
        step, speed = f"{1e3 * r.seconds:.1f}{wall}", f"{r.tokens_per_s:,.0f}"
        rows.append([r.shape, f"{r.name}{ranks}", step, speed, f"{r.relative:.2f}"])
    return markdown(rows, right=(2, 3, 4))


def mixtral_of(config: Config) -> nn.Module:
    """A Mixtral of `transformers` of the same shape, with as many parameters."""
    from transformers import AutoModelForCausalLM, MixtralConfig

    lm, moe = config.language_model, config.moe
    return AutoModelForCausalLM.from_config(
        MixtralConfig(
            vocab_size=config.data.vocabulary,
            hidden_size=lm.width,
            intermediate_size=moe.hidden,
            num_hidden_layers=lm.layers,
            num_attention_heads=lm.heads,
            num_key_value_heads=lm.heads,
            num_local_experts=moe.experts,
            num_experts_per_tok=moe.top_k,
            max_position_embeddings=config.data.context,
            tie_word_embeddings=lm.tied_head,
        )
    )


def _loops(config: Config, world: World, steps: int, rounds: int) -> list[MeasuredLoop]:
    shape = shape_of(config)
    print(f"measuring {shape}", file=sys.stderr)
    trainer = trainer_of(config, world)
    loops: dict[str, Callable[[], object]] = {
        BARE: _bare_loop(config, trainer, steps),
        OURS: lambda: _our_steps(trainer, steps),
    }
    square = torch.randn(SIDE, SIDE, device=world.device)
    loops[PRODUCTS] = lambda: [square @ square for _ in range(steps)]
    best = best_of_rounds(loops, rounds, world.device.type)
    best = {name: found / steps for name, found in best.items()}
    tokens = config.train.batch_size * config.data.context
    best[PRODUCTS] *= tokens * trainer.recorder.cost["flops_per_token"] / (2 * SIDE**3)
    if installed("transformers") and installed("accelerate"):
        best[TRANSFORMERS] = _transformers_seconds(config, trainer, steps, rounds)
    trainer.close()
    return [
        MeasuredLoop(shape, name, 1, found, tokens / found, found / best[BARE])
        for name, found in best.items()
    ]


def trainer_of(config: Config, world: World) -> Trainer:
    """A run that never evaluates or saves."""
    train = replace(config.train, steps=ENDLESS, eval_every=ENDLESS, save_every=ENDLESS)
    config = replace(config, train=train)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    return Trainer(config, world, lambda: False)


def _our_steps(trainer: Trainer, steps: int) -> None:
    with trainer.recorder.phases.collectives_timed():
        for _ in range(steps):
            trainer.update()
        trainer.write_log()


def _bare_loop(config: Config, trainer: Trainer, steps: int) -> Callable[[], None]:
    model = build_model(config).to(trainer.world.device)
    assert isinstance(model, LanguageModel)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.optimizer.lr, weight_decay=0.0, fused=True
    )
    order, data = np.random.default_rng(0), _data_of(trainer)

    def run() -> None:
        for _ in range(steps):
            chosen = order.integers(len(data), size=config.train.batch_size)
            loss, _ = model(data.batch(chosen).to(trainer.world.device))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.train.clip)
            optimizer.step()
            optimizer.zero_grad()

    return run


def _data_of(trainer: Trainer) -> DataSet:
    data = trainer.task.train
    if isinstance(data, TextStream):
        raise ConfigError("bench train needs data that are read by index: drop what streams them")
    return data


def _transformers_seconds(config: Config, trainer: Trainer, steps: int, rounds: int) -> float:
    """Seconds of a step, best of so many rounds, in a process of its own: beside our process
    group their trainer would take itself for one rank of several."""
    data, number = _data_of(trainer), config.train.batch_size * (steps + 1)
    samples = data.batch(np.arange(number) % len(data))[:, :-1]
    file = Path(config.runs_dir) / "transformers.json"
    device = trainer.world.device.type
    start_processes(
        _transformers_here, (config, samples, steps, rounds, device, file), start_method="spawn"
    )
    return float(json.loads(file.read_text()))


def _transformers_here(
    _: int, config: Config, samples: Tensor, steps: int, rounds: int, device: str, file: Path
) -> None:
    from transformers import Trainer as TheirTrainer
    from transformers import TrainerCallback, TrainingArguments

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)  # those of our group
    torch.set_num_threads(1)
    clock = time.process_time if device == "cpu" else time.perf_counter
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            del args, kwargs
            if device != "cpu":
                torch.cuda.synchronize()
            ends.append(clock())

    arguments = TrainingArguments(
        output_dir=str(file.parent / "transformers"),
        per_device_train_batch_size=config.train.batch_size,
        max_steps=steps + 1,
        learning_rate=config.optimizer.lr,
        lr_scheduler_type="constant",
        max_grad_norm=config.train.clip,
        logging_steps=steps,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=device == "cpu",
    )
    rows: Any = [{"input_ids": x, "labels": x} for x in samples]
    found = []
    for _ in range(max(1, rounds)):
        model: Any = mixtral_of(config)
        ends.clear()
        with contextlib.redirect_stdout(sys.stderr):  # they print what they log
            TheirTrainer(model, arguments, train_dataset=rows, callbacks=[Clock()]).train()
        found.append((ends[-1] - ends[0]) / steps)
    file.write_text(json.dumps(min(found)))


def _on_ranks(config: Config, ranks: int, steps: int) -> list[MeasuredLoop]:
    """Ours on one rank and on several, each in a process of its own."""
    tokens = config.train.batch_size * config.data.context
    results: list[MeasuredLoop] = []
    for size in (1, ranks):
        own = replace(config, runs_dir=str(Path(config.runs_dir) / f"{size}_ranks"))
        found = on_ranks(size, _on_this_rank, own, steps)
        busiest, wall = max(cpu for cpu, _ in found), max(wall for _, wall in found)
        one = results[0].seconds if results else busiest
        results.append(
            MeasuredLoop(
                shape=shape_of(config),
                name=OURS,
                ranks=size,
                seconds=busiest,
                tokens_per_s=tokens / busiest,
                relative=busiest / one,
                wall_seconds=wall,
            )
        )
    return results


def _on_this_rank(world: World, config: Config, steps: int) -> tuple[float, float]:
    trainer = trainer_of(config, world)
    _our_steps(trainer, steps)
    world.barrier()
    began = time.perf_counter()
    used = seconds(lambda: _our_steps(trainer, steps), world.device.type)
    wall = time.perf_counter() - began
    trainer.close()
    return used / steps, wall / steps


def shape_of(config: Config) -> str:
    lm, moe = config.language_model, config.moe
    return (
        f"{lm.layers} blocks of width {lm.width}, {moe.top_k} of {moe.experts} experts of "
        f"{moe.hidden}"
    )
