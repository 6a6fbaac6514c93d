"""The command line: `simvq-moe <command>`, the same as `python -m simvq_moe <command>`.

Standard output is for machine-readable results, standard error for everything else. Exit codes:
0 done, 1 failed, 2 usage or configuration error (one line, nothing written), 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

import simvq_moe
from simvq_moe.config.flags import check_range, parse_flags, with_flags
from simvq_moe.config.loading import ConfigError, merge_files, suggestion
from simvq_moe.config.plugins import load_plugins
from simvq_moe.config.ranges import COUNT, FACTOR, SEED
from simvq_moe.config.schema import Config
from simvq_moe.terminal import FAILED, USAGE_ERROR, ending, open_streams


@dataclass(frozen=True)
class TrainArgs:
    """What `train` takes beside the fields of the config."""

    config: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """A YAML file such as those in configs/; give it again to merge another on top."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the resolved config and what the run would cost, and stop."""
    cluster: Path | None = None
    """With --dry-run, the machines to predict the step time on: a YAML file such as those in
    configs/clusters/."""
    profile: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """The same as --train.profile True: trace a few steps, for TensorBoard and Perfetto."""


def train(args: Sequence[str]) -> int:
    """Train one run, or resume it: --config F [--config F2] [--section.key value ...]."""
    # a field of the config is a flag as well, so unknown flags and --help are the config's
    options, flags = parse_flags(
        TrainArgs, args, "simvq-moe train", return_unknown_args=True, add_help=False
    )
    prog = "simvq-moe train [--config FILE ...] [--profile] [--dry-run [--cluster FILE]]"
    config = with_flags(merge_files(Config, options.config, plugins=True), flags, prog)
    if options.profile:
        config = replace(config, train=replace(config.train, profile=True))
    if options.cluster is not None and not options.dry_run:
        raise ConfigError(f"--cluster {options.cluster} is for predictions: add --dry-run")
    if options.dry_run:
        from simvq_moe.training.dry_run import dry_run

        dry_run(config, options.cluster)
        return 0
    from simvq_moe.training import run

    return run.train(config)


@dataclass(frozen=True)
class SweepArgs:
    """Run every arm of a sweep with every seed, skip what is finished, and report."""

    config: tyro.conf.UseAppendAction[tuple[Path, ...]]
    """A sweep, such as configs/sweeps/quickstart.yaml; give it again to merge another on top."""
    ranks: int = 1
    """Processes of a run, more than one by the deepspeed launcher."""
    parallel: int = 1
    """Runs at a time, which share cores and GPUs."""
    arms: str = ""
    """Only these arms and their baselines, as in "vq,simvq" or "codes_512/vq"; empty: all."""
    index: int = 0
    """This task of a job array, from 0: it does every count-th run, or arm with a lr_grid."""
    count: int = 1
    """Tasks of the job array; the last to end reports."""


def sweep(args: Sequence[str]) -> int:
    """Run arms x paired seeds, resume broken ones, end with the report."""
    options = parse_flags(SweepArgs, args, "simvq-moe sweep")
    from simvq_moe.reports import report
    from simvq_moe.sweeps import checks, execute, machine, rate_grid
    from simvq_moe.sweeps import plan as sweeps
    from simvq_moe.training.preflight import check_launch

    if not options.config:
        raise ConfigError("sweep needs --config FILE, such as configs/sweeps/quickstart.yaml")
    check_range(count=(options.count, 1, COUNT))
    if not 0 <= options.index < options.count:
        raise ConfigError(f"--index {options.index} must be 0 to --count {options.count} less 1")
    here = machine.this_machine(options.ranks, options.parallel)
    arms = [arm.strip() for arm in options.arms.split(",")] if options.arms else []
    plan = sweeps.plan(options.config, arms)
    runs = (*rate_grid.grid_runs(plan), *rate_grid.with_rates(plan).runs)
    origin = sweeps.origin_of(options.config)
    checks.check_runs(runs, origin, check_launch, options.ranks)
    own = execute.execute(plan, here, options.index, options.count)
    complete = all(run.status == "finished" for run in own)
    if any(run.status in ("pending", "running") for run in plan.runs):
        print(
            f"the other tasks' runs go on; after them: simvq-moe report {plan.folder} "
            f"--out {plan.folder / 'report'}",
            file=sys.stderr,
        )
        return 0 if complete else FAILED
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
    baseline: str | None = None
    """Arm, or folder of a run, that runs without a sweep are compared with; None: that of the first
    path, or the first arm by name where the path is a folder of runs."""


def report(args: Sequence[str]) -> int:
    """Compare runs: report.html, report.json, report.md."""
    options = parse_flags(ReportArgs, args, "simvq-moe report")
    if not options.paths:
        raise ConfigError("report needs runs: simvq-moe report RUN_OR_FOLDER ... --out FOLDER")
    from simvq_moe.reports import report as reports

    found = reports.report(options.paths, options.out, options.baseline)
    print(found.table)
    print(f"report: {found.html}", file=sys.stderr)
    return 0


@dataclass(frozen=True)
class DashboardArgs:
    """Serve TensorBoard with the usage of codes and experts on 127.0.0.1."""

    runs_dir: tyro.conf.Positional[Path] = Path("runs")
    """Folder of runs."""
    port: int = 6006
    """Port; 0 takes a free one."""


def dashboard(args: Sequence[str]) -> int:
    """Watch usage live in TensorBoard on 127.0.0.1."""
    options = parse_flags(DashboardArgs, args, "simvq-moe dashboard")
    check_range(port=(options.port, 0, 65_535))
    from simvq_moe.reports import dashboard as tensorboard

    return tensorboard.serve(options.runs_dir, options.port)


@dataclass(frozen=True)
class WatchArgs:
    """A live table of runs in the terminal: progress, loss, usage, dead slots, time left."""

    runs_dir: tyro.conf.Positional[Path] = Path("runs")
    """Folder of runs."""
    once: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print every run once and stop, as where standard output is no terminal."""


def watch(args: Sequence[str]) -> int:
    """Watch runs live in the terminal."""
    options = parse_flags(WatchArgs, args, "simvq-moe watch")
    from simvq_moe.reports import watch as watching

    return watching.watch(options.runs_dir, once=options.once)


@dataclass(frozen=True)
class EvalArgs:
    """Held-out measures of a run's model, as JSON on standard output."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    data: str | None = None
    """Another source, whose held-out part is measured with the run's tokenizer; None: the run's."""
    rfid: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Image tokenizers: also the Frechet distance, by the InceptionV3 of torch-fidelity."""
    lpips: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Image tokenizers: also LPIPS, by torchvision's weights of VGG16."""
    cache_dir: Path | None = None
    """Text: folder of what is derived from the source, such as the run's own data.cache_dir; None:
    .cache here, wherever the run's config says."""
    plugins: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A plug-in that the run needs; give it again for more."""


def evaluate(args: Sequence[str]) -> int:
    """Evaluate a run over its whole held-out set, or another source's: JSON."""
    options = parse_flags(EvalArgs, args, "simvq-moe eval")
    load_plugins(options.plugins)
    from simvq_moe.inference import evaluate as evaluation

    measures = [name for name in ("lpips", "rfid") if getattr(options, name)]
    found = evaluation.evaluate_run(
        options.run, options.data, measures=measures, cache_dir=options.cache_dir
    )
    print(json.dumps(found, indent=1))
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
    plugins: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A plug-in that the run needs; give it again for more."""


def fold(args: Sequence[str]) -> int:
    """Merge a run's shared maps into its weights: model.safetensors."""
    options = parse_flags(FoldArgs, args, "simvq-moe fold")
    load_plugins(options.plugins)
    from simvq_moe.inference import fold as folding

    difference = folding.fold_run(options.run, options.out, merge_norms=options.merge_norms)
    print(f"{options.out}: folded, outputs differ by {difference:.1g} in float64", file=sys.stderr)
    return 0


@dataclass(frozen=True)
class ExportArgs:
    """Write a run's model for others to load, without shared maps, checked equal before anything
    is written."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    to: Literal["hf", "safetensors"]
    """hf: a language model on text as a folder for AutoModelForCausalLM and AutoTokenizer;
    safetensors: any model as one file with our names, whose header holds the config."""
    out: Path
    """Folder of the files."""
    plugins: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A plug-in that the run needs; give it again for more."""


def export(args: Sequence[str]) -> int:
    """Write a run's model for transformers, or as one safetensors file."""
    options = parse_flags(ExportArgs, args, "simvq-moe export")
    load_plugins(options.plugins)
    from simvq_moe.inference import export as exporting

    made = exporting.export_run(options.run, options.out, options.to)
    print(f"{options.out}: {made}", file=sys.stderr)
    return 0


@dataclass(frozen=True)
class EncodeArgs:
    """Write a data set as token shards: the codes that a tokenizer's run gives its images or
    recordings, each of them once. The same command again goes on; under a launcher the ranks share
    the shards."""

    run: tyro.conf.Positional[Path]
    """Folder of the run of an image or audio tokenizer."""
    out: Path
    """Folder of train_*.npy, held_out_*.npy, items.json and manifest.json."""
    data: str | None = None
    """Another source than the run's, with held-out images or recordings of its own."""
    crops: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Encode as many random crops as the run's config draws, in place of whole images and
    recordings, which windows of the size of a crop cover once."""
    shard_samples: int = 16_384
    """Samples of a shard: windows or crops."""
    plugins: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A plug-in that the run needs; give it again for more."""


def encode(args: Sequence[str]) -> int:
    """Encode a run's images or audio, or another source's, into token shards."""
    options = parse_flags(EncodeArgs, args, "simvq-moe encode")
    load_plugins(options.plugins)
    check_range(shard_samples=(options.shard_samples, 1, COUNT))
    from simvq_moe.inference import encode as encoding

    manifest = encoding.encode_run(
        *(options.run, options.data, options.out, options.shard_samples), whole=not options.crops
    )
    if _is_main():
        counts = " + ".join(f"{samples:,} {part}" for part, samples in manifest.samples.items())
        size = f"{manifest.context} codes of {manifest.begin}"
        print(f"{options.out}: {counts} samples, each {size}", file=sys.stderr)
    return 0


@dataclass(frozen=True)
class DecodeArgs:
    """Write the images or recordings of token shards, by the tokenizer that encoded them."""

    folder: tyro.conf.Positional[Path]
    """Folder that `encode` wrote."""
    out: Path
    """Folder of train/000000.png ... and held_out/000000.png ..., or .wav."""
    limit: int | None = None
    """Images, recordings or crops of each part; None: all."""
    plugins: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A plug-in that the run needs; give it again for more."""


def decode(args: Sequence[str]) -> int:
    """Decode token shards to png or wav files."""
    options = parse_flags(DecodeArgs, args, "simvq-moe decode")
    load_plugins(options.plugins)
    check_range(limit=(options.limit, 1, COUNT))
    from simvq_moe.inference import decode as decoding

    written = decoding.decode_folder(options.folder, options.out, options.limit)
    print(f"{options.out}: {written:,} samples", file=sys.stderr)
    return 0


@dataclass(frozen=True)
class GenerateArgs:
    """What a language model's run makes: text on standard output or, of codes, images or sound."""

    run: tyro.conf.Positional[Path]
    """Folder of the run, or of its folded model."""
    prompt: str = ""
    """Text: how the document begins."""
    tokens: int = 128
    """Text: tokens of the continuation."""
    samples: int = 8
    """Codes: new images or clips."""
    out: Path | None = None
    """Codes: their folder."""
    temperature: float | None = None
    """Of the softmax that is drawn from; 0: always the best token; None: 0.8 for text, 1 for codes.
    """
    top_k: int = 0
    """Draw from so many best tokens; 0: from all."""
    seed: int = 0
    """Seed of the drawing."""
    plugins: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A plug-in that the run needs; give it again for more."""


def generate(args: Sequence[str]) -> int:
    """Let a language model's run continue a text, or make images or sound (--out)."""
    options = parse_flags(GenerateArgs, args, "simvq-moe generate")
    load_plugins(options.plugins)
    check_range(
        tokens=(options.tokens, 1, COUNT),
        samples=(options.samples, 1, COUNT),
        temperature=(options.temperature, 0, FACTOR),
        top_k=(options.top_k, 0, COUNT),
        seed=(options.seed, 0, SEED),
    )
    from simvq_moe.inference import generate as generation

    of_drawing = {"top_k": options.top_k, "seed": options.seed}
    given = options.temperature
    if options.out is not None:
        of_drawing["temperature"] = 1.0 if given is None else given
        generation.generate_samples(options.run, options.out, options.samples, **of_drawing)
        print(f"{options.out}: {options.samples:,} samples", file=sys.stderr)
        return 0
    of_drawing["temperature"] = 0.8 if given is None else given
    text = generation.generate_text(
        options.run, options.prompt, tokens=options.tokens, **of_drawing
    )
    print(text)
    return 0


def bench(args: Sequence[str]) -> int:
    """Measure against peers: bench quantizer, moe, train; or this machine: bench cluster."""
    from simvq_moe.benchmarks import command

    return command.bench(args)


@dataclass(frozen=True)
class DoctorArgs:
    """Check versions, devices, DeepSpeed and data, and say what to do where something is off."""


def doctor(args: Sequence[str]) -> int:
    """Check this machine: versions, devices, DeepSpeed, data, offline state."""
    parse_flags(DoctorArgs, args, "simvq-moe doctor")
    from simvq_moe import diagnosis

    return diagnosis.doctor()


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "sweep": sweep,
    "report": report,
    "dashboard": dashboard,
    "watch": watch,
    "eval": evaluate,
    "encode": encode,
    "decode": decode,
    "fold": fold,
    "export": export,
    "generate": generate,
    "bench": bench,
    "doctor": doctor,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    if argv is None:
        open_streams()
    args = list(sys.argv[1:] if argv is None else argv)
    # the deepspeed launcher puts the local rank first or last; the environment has it as well
    args = [arg for arg in args if not arg.startswith("--local_rank=")]
    return ending(lambda: _run(args), told=_is_main)


def _run(args: Sequence[str]) -> int:
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


def _overview() -> str:
    lines = [f"  {name:10} {(run.__doc__ or '').strip()}" for name, run in COMMANDS.items()]
    return "\n".join(
        ["usage: simvq-moe COMMAND ...", "", *lines, "", "simvq-moe COMMAND --help tells more"]
    )


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    sys.exit(main())
