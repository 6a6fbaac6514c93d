"""`eval`, `fold`, `export`, `encode`, `decode` and `generate`: what a trained model is used for."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from simvq_moe.config.flags import parse_flags
from simvq_moe.config.plugins import load_plugins
from simvq_moe.config.ranges import Count, CountOr0, Seed, Weight
from simvq_moe.errors import ConfigError
from simvq_moe.terminal import is_first_rank, unheard


@dataclass(frozen=True, kw_only=True)
class OfRun:
    """What every command takes that builds a run's model."""

    plugins: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A plug-in that the run needs; give it again for more."""


Args = TypeVar("Args", bound=OfRun)


def _parsed(schema: type[Args], args: Sequence[str], prog: str) -> Args:
    """The flags of a command; its plug-ins are loaded."""
    options: Args = parse_flags(schema, args, prog)
    load_plugins(options.plugins)
    return options


@dataclass(frozen=True, kw_only=True)
class EvalArgs(OfRun):
    """Held-out measures of a run's model, as JSON on standard output."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    data: str | None = None
    """Another source, whose held-out part is measured with the run's tokenizer; None: the run's."""
    rfid: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Image tokenizers: also the Frechet distance, by the InceptionV3 of torch-fidelity."""
    lpips: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Image tokenizers: also LPIPS, by torchvision's weights of VGG16."""
    tasks: str | None = None
    """Language models on text: tasks of lm-eval in place of the held-out set, names or .yaml files
    with commas between them; their measures join the summary of a finished run."""
    limit: Count | None = None
    """Examples of each of --tasks at most, which then join no summary; None: all."""
    cache_dir: Path | None = None
    """Text: folder of what is derived from the source, such as the run's own data.cache_dir; None:
    .cache here, wherever the run's config says."""


def evaluate(args: Sequence[str]) -> int:
    """Evaluate a run over its whole held-out set, or another source's: JSON."""
    options = _parsed(EvalArgs, args, "simvq-moe eval")
    if options.tasks is not None:
        return _evaluate_tasks(options)
    if options.limit is not None:
        raise ConfigError(f"--limit {options.limit} is for --tasks: add --tasks, or drop it")
    from simvq_moe.inference import evaluate as evaluation

    measures = [name for name in ("lpips", "rfid") if getattr(options, name)]
    found = evaluation.evaluate_run(
        options.run, options.data, measures=measures, cache_dir=options.cache_dir
    )
    print(json.dumps(found, indent=1))
    return 0


def _evaluate_tasks(options: EvalArgs) -> int:
    for name in ("data", "rfid", "lpips", "cache_dir"):
        if getattr(options, name):
            raise ConfigError(f"--{name} with --tasks, which have data of their own: drop one")
    from simvq_moe.inference import harness

    names = [name.strip() for name in str(options.tasks).split(",") if name.strip()]
    if not names:
        raise ConfigError("--tasks names no task: give names of lm-eval, or .yaml files")
    found = harness.evaluate_tasks(options.run, names, limit=options.limit)
    print(json.dumps(found, indent=1))
    return 0


@dataclass(frozen=True, kw_only=True)
class FoldArgs(OfRun):
    """Write the same model without shared maps, checked equal before anything is written."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    out: Path
    """Folder of model.safetensors and its config.yaml."""
    merge_norms: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Language models: also merge the gain of each norm into the matrices that read its output. The
    gain before a tied head stays, because its matrix is also the embedding."""


def fold(args: Sequence[str]) -> int:
    """Merge a run's shared maps into its weights: model.safetensors."""
    options = _parsed(FoldArgs, args, "simvq-moe fold")
    from simvq_moe.inference import fold as folding

    difference = folding.fold_run(options.run, options.out, merge_norms=options.merge_norms)
    print(f"{options.out}: folded, outputs differ by {difference:.1g} in float64", file=sys.stderr)
    return 0


@dataclass(frozen=True, kw_only=True)
class ExportArgs(OfRun):
    """Write a run's model for others to load, without shared maps, checked equal before anything
    is written."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    to: Literal["hf", "safetensors"]
    """hf: a language model on text as a folder for AutoModelForCausalLM and AutoTokenizer;
    safetensors: any model as one file with our names, whose header holds the config."""
    out: Path
    """Folder of the files."""


def export(args: Sequence[str]) -> int:
    """Write a run's model for transformers, or as one safetensors file."""
    options = _parsed(ExportArgs, args, "simvq-moe export")
    from simvq_moe.inference import export as exporting

    made = exporting.export_run(options.run, options.out, options.to)
    print(f"{options.out}: {made}", file=sys.stderr)
    return 0


@dataclass(frozen=True, kw_only=True)
class EncodeArgs(OfRun):
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
    shard_samples: Count = 16_384
    """Samples of a shard: windows or crops."""


def encode(args: Sequence[str]) -> int:
    """Encode a run's images or audio, or another source's, into token shards."""
    options = _parsed(EncodeArgs, args, "simvq-moe encode")
    from simvq_moe.inference import encode as encoding

    with unheard():
        manifest = encoding.encode_run(
            options.run,
            options.data,
            options.out,
            shard_samples=options.shard_samples,
            whole=not options.crops,
        )
    if is_first_rank():
        counts = " + ".join(f"{samples:,} {part}" for part, samples in manifest.samples.items())
        size = f"{manifest.context} codes of {manifest.begin}"
        print(f"{options.out}: {counts} samples, each {size}", file=sys.stderr)
    return 0


@dataclass(frozen=True, kw_only=True)
class DecodeArgs(OfRun):
    """Write the images or recordings of token shards, by the tokenizer that encoded them."""

    folder: tyro.conf.Positional[Path]
    """Folder that `encode` wrote."""
    out: Path
    """Folder of train/000000.png ... and held_out/000000.png ..., or .wav."""
    limit: Count | None = None
    """Images, recordings or crops of each part; None: all."""


def decode(args: Sequence[str]) -> int:
    """Decode token shards to png or wav files."""
    options = _parsed(DecodeArgs, args, "simvq-moe decode")
    from simvq_moe.inference import decode as decoding

    written = decoding.decode_folder(options.folder, options.out, options.limit)
    print(f"{options.out}: {written:,} samples", file=sys.stderr)
    return 0


@dataclass(frozen=True, kw_only=True)
class GenerateArgs(OfRun):
    """What a language model's run makes: text on standard output or, of codes, images or sound."""

    run: tyro.conf.Positional[Path]
    """Folder of the run, or of its folded model."""
    prompt: str = ""
    """Text: how the document begins."""
    tokens: Count = 128
    """Text: tokens of the continuation."""
    samples: Count = 8
    """Codes: new images or clips."""
    out: Path | None = None
    """Codes: their folder."""
    temperature: Weight | None = None
    """Temperature of the softmax; 0: always the best token; None: 0.8 for text, 1 for codes."""
    top_k: CountOr0 = 0
    """Draw from so many best tokens; 0: from all."""
    seed: Seed = 0
    """Seed of the drawing."""


def generate(args: Sequence[str]) -> int:
    """Let a language model's run continue a text, or make images or sound (--out)."""
    options = _parsed(GenerateArgs, args, "simvq-moe generate")
    from simvq_moe.inference import generate as generation

    names = ("temperature", "top_k", "seed")
    of_drawing: dict[str, Any] = {name: getattr(options, name) for name in names}
    if options.out is not None:
        generation.generate_samples(options.run, options.out, options.samples, **of_drawing)
        print(f"{options.out}: {options.samples:,} samples", file=sys.stderr)
        return 0
    text = generation.generate_text(
        options.run, options.prompt, tokens=options.tokens, **of_drawing
    )
    print(text)
    return 0
