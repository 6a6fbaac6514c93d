"""The command line: `simvq-moe <command>`, the same as `python -m simvq_moe <command>`.

Standard output is for machine-readable results, standard error for everything else. Exit codes:
0 done, 1 failed, 2 usage or configuration error (one line, nothing written), 130 interrupted.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import simvq_moe
from simvq_moe.config import Config
from simvq_moe.merging import ConfigError, flag_error, merge_files, suggestion, with_flags

FAILED, USAGE_ERROR, INTERRUPTED = 1, 2, 130


@dataclass(frozen=True)
class TrainArgs:
    """What `train` takes beside the fields of the config."""

    config: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """A YAML file such as those in configs/; give it again to merge another on top."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the resolved config and the parameter counts, and stop."""


def train(args: Sequence[str]) -> int:
    """Train one run, or resume it: --config F [--config F2] [--section.key value ...]."""
    # a field of the config is a flag as well, so unknown flags and --help are the config's
    options, flags = _parse(TrainArgs, args, "train", return_unknown_args=True, add_help=False)
    prog = "simvq-moe train [--config FILE ...] [--dry-run]"
    config = with_flags(merge_files(Config, options.config), flags, prog)
    from simvq_moe.training import run

    return run.dry_run(config) if options.dry_run else run.train(config)


@dataclass(frozen=True)
class SweepArgs:
    """Run every arm of a sweep with every seed, skip what is finished, and report."""

    config: tyro.conf.UseAppendAction[tuple[Path, ...]]
    """A sweep, such as configs/sweeps/quickstart.yaml; give it again to merge another on top."""
    ranks: int = 1
    """Processes of a run, started by the deepspeed launcher."""


def sweep(args: Sequence[str]) -> int:
    """Run arms x paired seeds, resume broken ones, end with the report."""
    options = _parse(SweepArgs, args, "sweep")
    from simvq_moe.analysis import report
    from simvq_moe.analysis import sweep as sweeps
    from simvq_moe.training.run import check_launch

    if not options.config:
        raise ConfigError("sweep needs --config FILE, such as configs/sweeps/quickstart.yaml")
    plan = sweeps.plan(options.config)
    for run in plan.runs:
        check_launch(run.config, options.ranks)
    complete = sweeps.execute(plan, options.ranks)
    found = report.report([plan.folder], plan.folder / "report")
    print(found.table)
    print(f"report: {found.html}", file=sys.stderr)
    return 0 if complete else FAILED


@dataclass(frozen=True)
class ReportArgs:
    """Write report.html, report.json and report.md of runs or sweeps."""

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories, sweep directories, or folders that hold some."""
    out: Path
    """Folder of the report."""


def report(args: Sequence[str]) -> int:
    """Compare runs: report.html, report.json, report.md."""
    options = _parse(ReportArgs, args, "report")
    if not options.paths:
        raise ConfigError("report needs runs: simvq-moe report RUN_OR_FOLDER ... --out FOLDER")
    from simvq_moe.analysis import report as reports

    found = reports.report(options.paths, options.out)
    print(found.table)
    print(f"report: {found.html}", file=sys.stderr)
    return 0


@dataclass(frozen=True)
class DashboardArgs:
    """Serve TensorBoard with the usage of codes and experts on 127.0.0.1."""

    runs_dir: tyro.conf.Positional[Path]
    """Folder of runs."""
    port: int = 6006
    """Port; 0 takes a free one."""


def dashboard(args: Sequence[str]) -> int:
    """Watch usage live in TensorBoard on 127.0.0.1."""
    options = _parse(DashboardArgs, args, "dashboard")
    from simvq_moe.analysis import tensorboard

    return tensorboard.serve(options.runs_dir, options.port)


@dataclass(frozen=True)
class EvalArgs:
    """Held-out measures of a run's model, as JSON on standard output."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    data: str | None = None
    """Another source, whose held-out part is measured with the run's tokenizer; None: the run's."""


def evaluate(args: Sequence[str]) -> int:
    """Evaluate a run over its whole held-out set, or another source's: JSON."""
    options = _parse(EvalArgs, args, "eval")
    from simvq_moe.training import export

    print(json.dumps(export.evaluate_run(options.run, options.data), indent=1))
    return 0


@dataclass(frozen=True)
class FoldArgs:
    """Write the same model without shared maps, checked equal before anything is written."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    out: Path
    """Folder of model.safetensors and its config.yaml."""
    merge_norms: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Language models: also merge the gain of each norm into the matrices that read its output. The
    gain before a tied head stays, for its matrix is also the embedding."""


def fold(args: Sequence[str]) -> int:
    """Merge a run's shared maps into its weights: model.safetensors."""
    options = _parse(FoldArgs, args, "fold")
    from simvq_moe.training import export

    difference = export.fold_run(options.run, options.out, merge_norms=options.merge_norms)
    print(f"{options.out}: folded, outputs differ by {difference:.1g} in float64", file=sys.stderr)
    return 0


@dataclass(frozen=True)
class GenerateArgs:
    """Text that a language model's run writes, on standard output."""

    run: tyro.conf.Positional[Path]
    """Folder of the run, or of its folded model."""
    prompt: str = ""
    """How the document begins."""
    tokens: int = 128
    """Tokens of the continuation."""
    temperature: float = 0.8
    """Of the softmax that is drawn from; 0: always the best token."""
    top_k: int = 0
    """Draw from so many best tokens; 0: from all."""
    seed: int = 0
    """Seed of the drawing."""


def generate(args: Sequence[str]) -> int:
    """Let a language model's run continue a text."""
    options = _parse(GenerateArgs, args, "generate")
    from simvq_moe.training import export

    numbers = {name: getattr(options, name) for name in ("tokens", "temperature", "top_k", "seed")}
    print(export.generate_text(options.run, options.prompt, **numbers))
    return 0


@dataclass(frozen=True)
class BenchArgs:
    """Time quantizers side by side with their peers in one process; ratios, not records."""

    json: Path | None = None
    """Also write every number to this file."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where."""


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
    rounds: int = 5
    """Rounds of which the best counts."""


def bench(args: Sequence[str]) -> int:
    """Measure speed and memory side by side with peers: bench quantizer, bench moe."""
    known = {"quantizer": BenchArgs, "moe": BenchMoEArgs}
    if not args or args[0] not in (*known, "-h", "--help"):
        raise ConfigError(f"bench {' '.join(args[:1])}: choose one of {', '.join(known)}")
    subjects: Any = Annotated[BenchArgs, tyro.conf.subcommand("quantizer")]
    subjects |= Annotated[BenchMoEArgs, tyro.conf.subcommand("moe")]
    options = _parse(subjects, args, "bench")
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this machine has no CUDA device; use --device cpu")
    moe = isinstance(options, BenchMoEArgs)
    results, table = _bench_moe(options) if moe else _bench_quantizer(options)
    print(table)
    if options.json is not None:
        options.json.write_text(json.dumps([r.as_dict() for r in results], indent=1) + "\n")
    return 0


def _bench_quantizer(options: BenchArgs) -> tuple[list[Any], str]:
    from simvq_moe import bench as benches

    results = benches.bench_quantizer(device=options.device)
    return results, benches.table(results)


def _bench_moe(options: BenchMoEArgs) -> tuple[list[Any], str]:
    from simvq_moe import bench_moe as benches

    names = ("width", "hidden", "experts", "top_k", "tokens", "dtype")
    sizes = {name: getattr(options, name) for name in names}
    preset = benches.FULL if options.full else benches.QUICK
    cases = benches.moe_cases(preset, load=options.skew, **sizes)
    results = benches.bench_moe(cases, rounds=options.rounds, device=options.device)
    return results, benches.moe_table(results)


@dataclass(frozen=True)
class DoctorArgs:
    """Check versions, devices, DeepSpeed and data, and say what to do where something is off."""


def doctor(args: Sequence[str]) -> int:
    """Check this machine: versions, devices, DeepSpeed, data, offline state."""
    _parse(DoctorArgs, args, "doctor")
    from simvq_moe import diagnosis

    return diagnosis.doctor()


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "sweep": sweep,
    "report": report,
    "dashboard": dashboard,
    "eval": evaluate,
    "fold": fold,
    "generate": generate,
    "bench": bench,
    "doctor": doctor,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    # the deepspeed launcher puts the local rank first or last; the environment has it as well
    args = [arg for arg in args if not arg.startswith("--local_rank=")]
    try:
        if not args or args[0] in ("-h", "--help"):
            print(_overview(), file=sys.stdout if args else sys.stderr)
            return 0 if args else USAGE_ERROR
        if args[0] == "--version":
            print(simvq_moe.__version__)
            return 0
        if args[0] not in COMMANDS:
            raise ConfigError(
                f"unknown command {args[0]!r}.{suggestion(args[0], list(COMMANDS))} "
                "simvq-moe --help lists them"
            )
        return COMMANDS[args[0]](args[1:])
    except ConfigError as error:
        if _is_main():
            print(f"simvq-moe: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED


def _parse(schema: type, args: Sequence[str], command: str, **options: Any) -> Any:
    console = io.StringIO()
    prog = f"simvq-moe {command}"
    try:
        with contextlib.redirect_stderr(console):
            return tyro.cli(schema, args=args, prog=prog, use_underscores=True, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise flag_error(console.getvalue()) from None


def _overview() -> str:
    lines = [f"  {name:10} {(run.__doc__ or '').strip()}" for name, run in COMMANDS.items()]
    return "\n".join(
        ["usage: simvq-moe COMMAND ...", "", *lines, "", "simvq-moe COMMAND --help tells more"]
    )


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    sys.exit(main())
