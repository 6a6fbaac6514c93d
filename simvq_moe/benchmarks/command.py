"""The command `simvq-moe bench`: which measurements there are, and their options."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from simvq_moe.config.flags import parse_flags
from simvq_moe.config.loading import merge_files
from simvq_moe.config.ranges import Count
from simvq_moe.config.schema import Config
from simvq_moe.errors import ConfigError

SUBJECTS = ("quantizer", "moe", "train", "cluster")


@dataclass(frozen=True)
class BenchArgs:
    """Time ours side by side with peers in one process; ratios, not records."""

    json: Path | None = None
    """Write every number to this file as well."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where."""


@dataclass(frozen=True)
class BenchQuantizerArgs(BenchArgs):
    """Time quantizers side by side with their peers in one process; ratios, not records."""

    codes: tuple[int, ...] = ()
    """Numbers of codes that are measured, of those there are; none: all of them."""


@dataclass(frozen=True)
class BenchMoEArgs(BenchArgs):
    """Time MoE layers, DeepSpeed's and transformers' too, against a dense network: CPU seconds of
    one thread, best of several rounds. Every combination of the sizes is measured."""

    full: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """All sizes, for hours, in place of those of 3 minutes; sizes given replace both."""
    width: tuple[int, ...] = ()
    """Channels of a token."""
    hidden: tuple[int, ...] = ()
    """Channels inside an expert."""
    experts: tuple[int, ...] = ()
    """Number of experts."""
    top_k: tuple[int, ...] = ()
    """Experts of a token."""
    tokens: tuple[int, ...] = ()
    """Tokens of a step."""
    dtype: tuple[Literal["float32", "bfloat16"], ...] = ()
    """Precision of tokens, weights and products."""
    skew: tuple[Literal["even", "skewed"], ...] = ()
    """Even assignments, or half of the tokens on one expert."""
    rounds: Count = 5
    """Rounds of which the best counts."""


@dataclass(frozen=True)
class BenchTrainArgs(BenchArgs):
    """Time our training loop against a bare PyTorch loop of the same model, transformers' Trainer
    with a Mixtral of the same shape, and itself on several ranks."""

    config: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """A language model's config in place of the two shapes of 3 minutes, its experts SwiGLU; give
    it again to merge another on top."""
    steps: Count = 10
    """Optimizer steps of a round."""
    rounds: Count = 3
    """Rounds of which the best counts."""
    ranks: Count = 2
    """Processes of the last comparison; 1: none."""


@dataclass(frozen=True)
class BenchClusterArgs:
    """Measure what `train --dry-run --cluster` needs to know of this machine, and steps beside what
    it predicts of them, on one rank and on several."""

    config: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """A language model's config in place of the two shapes of bench train; give it again to merge
    another on top."""
    ranks: Count = 2
    """Processes, one a GPU where there are any."""
    rounds: Count = 10
    """Rounds whose median counts."""
    out: Path | None = None
    """Write the numbers of the last row to this file, for --cluster."""
    json: Path | None = None
    """Write every number to this file as well."""


def bench(args: Sequence[str]) -> int:
    """Measure speed and memory side by side with peers, or this machine for predictions."""
    if not args or args[0] not in (*SUBJECTS, "-h", "--help"):
        raise ConfigError(f"bench {' '.join(args[:1])}: choose one of {', '.join(SUBJECTS)}")
    subjects: Any = Annotated[BenchQuantizerArgs, tyro.conf.subcommand("quantizer")]
    subjects |= Annotated[BenchMoEArgs, tyro.conf.subcommand("moe")]
    subjects |= Annotated[BenchTrainArgs, tyro.conf.subcommand("train")]
    subjects |= Annotated[BenchClusterArgs, tyro.conf.subcommand("cluster")]
    options = parse_flags(subjects, args, "simvq-moe bench")
    _check_file("json", options.json)
    if isinstance(options, BenchClusterArgs):
        results, table = _bench_cluster(options)
    else:
        results, table = _bench_peers(options)
    print(table)
    if options.json is not None:
        options.json.write_text(json.dumps([r.as_dict() for r in results], indent=1) + "\n")
    return 0


def _check_file(flag: str, path: Path | None) -> None:
    """Raise `ConfigError` for a file that can't be written, before anything is measured."""
    if path is not None and path.is_dir():
        raise ConfigError(f"--{flag} {path} is a folder: give a file")
    if path is not None and not path.parent.is_dir():
        raise ConfigError(f"--{flag} {path}: make the folder {path.parent} first")


def _check_cluster_file(out: Path, options: BenchClusterArgs) -> None:
    """Raise `ConfigError` also for numbers that would be worth nothing in a file."""
    _check_file("out", out)
    if out.exists():
        raise ConfigError(f"--out {out} exists: give another name, or remove it")
    if not options.config:
        raise ConfigError(f"--out {out}: the numbers are those of a model: add --config")
    if options.ranks == 1:
        raise ConfigError("--ranks 1 with --out: one rank sends nothing to measure; use 2 or more")


def _bench_peers(options: BenchArgs) -> tuple[list[Any], str]:
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this machine has no CUDA device; use --device cpu")
    if isinstance(options, BenchMoEArgs):
        return _bench_moe(options)
    if isinstance(options, BenchTrainArgs):
        return _bench_train(options)
    assert isinstance(options, BenchQuantizerArgs)
    return _bench_quantizer(options)


def _bench_quantizer(options: BenchQuantizerArgs) -> tuple[list[Any], str]:
    from simvq_moe.benchmarks import quantizer as benches

    sizes = [codes for _, codes, _ in benches.CASES]
    if unknown := [codes for codes in options.codes if codes not in sizes]:
        raise ConfigError(f"--codes {unknown[0]}: use some of {', '.join(map(str, sizes))}")
    cases = [case for case in benches.CASES if not options.codes or case[1] in options.codes]
    results = benches.bench_quantizer(cases, device=options.device)
    return results, benches.table(results)


def _bench_moe(options: BenchMoEArgs) -> tuple[list[Any], str]:
    from simvq_moe.benchmarks import moe as benches

    names = ("width", "hidden", "experts", "top_k", "tokens", "dtype")
    sizes = {name: getattr(options, name) for name in names}
    preset = benches.FULL if options.full else benches.QUICK
    cases = benches.moe_cases(preset, load=options.skew, **sizes)
    results = benches.bench_moe(cases, rounds=options.rounds, device=options.device)
    return results, benches.moe_table(results)


def _bench_train(options: BenchTrainArgs) -> tuple[list[Any], str]:
    from simvq_moe.benchmarks import train as benches
    from simvq_moe.engine.world import start_distributed

    numbers = {name: getattr(options, name) for name in ("steps", "rounds", "ranks")}
    shapes = benches.SHAPES
    if options.config:
        shapes = [benches.with_swiglu(merge_files(Config, options.config, plugins=True))]
    results = benches.bench_train(shapes, start_distributed(), **numbers)
    return results, benches.train_table(results)


def _bench_cluster(options: BenchClusterArgs) -> tuple[list[Any], str]:
    from simvq_moe.benchmarks import cluster as benches
    from simvq_moe.benchmarks.train import SHAPES

    if options.out is not None:
        _check_cluster_file(options.out, options)
    shapes = [merge_files(Config, options.config)] if options.config else SHAPES
    results = benches.bench_cluster(shapes, ranks=options.ranks, rounds=options.rounds)
    if options.out is not None:
        options.out.write_text(benches.cluster_file(results[-1]))
    return results, benches.cluster_table(results)
