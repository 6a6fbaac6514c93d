"""The command line: `simvq-moe <command>`, the same as `python -m simvq_moe <command>`.

Standard output is for machine-readable results, standard error for everything else. Exit codes:
0 done, 1 failed, 2 usage or configuration error (one line, nothing written), 130 interrupted.
Only what a command needs is imported.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

import simvq_moe
from simvq_moe.errors import USAGE_ERROR, ConfigError
from simvq_moe.extras import is_missing
from simvq_moe.terminal import ending, is_first_rank, open_streams


class Command(NamedTuple):
    """What is known of a command before it is imported."""

    function: str
    """Module within the package, and function that takes the arguments and gives the exit code."""
    summary: str
    """Its line in the overview."""


COMMANDS = {
    "train": Command(
        "commands.training:train",
        "Train one run, or resume it: --config F [--config F2] [--section.key value ...].",
    ),
    "sweep": Command(
        "commands.training:sweep",
        "Run arms x paired seeds, resume broken ones, end with the report.",
    ),
    "report": Command(
        "commands.looking:report",
        "Compare runs: report.html, report.json, report.md.",
    ),
    "dashboard": Command(
        "commands.looking:dashboard",
        "Watch usage live in TensorBoard on 127.0.0.1.",
    ),
    "watch": Command(
        "commands.looking:watch",
        "Watch runs live in the terminal.",
    ),
    "eval": Command(
        "commands.models:evaluate",
        "Evaluate a run over its whole held-out set, or another source's: JSON.",
    ),
    "encode": Command(
        "commands.models:encode",
        "Encode a run's images or audio, or another source's, into token shards.",
    ),
    "decode": Command(
        "commands.models:decode",
        "Decode token shards to png or wav files.",
    ),
    "fold": Command(
        "commands.models:fold",
        "Merge a run's shared maps into its weights: model.safetensors.",
    ),
    "export": Command(
        "commands.models:export",
        "Write a run's model for transformers, or as one safetensors file.",
    ),
    "generate": Command(
        "commands.models:generate",
        "Let a language model's run continue a text, or make images or sound (--out).",
    ),
    "recipes": Command(
        "commands.looking:recipes",
        "List the configs and sweeps that come with the package.",
    ),
    "init": Command(
        "commands.looking:init",
        "Copy a recipe to a file of your own: init image_quickstart.",
    ),
    "bench": Command(
        "benchmarks.command:bench",
        "Measure against peers: bench quantizer, moe, train; or this machine: bench cluster.",
    ),
    "doctor": Command(
        "commands.looking:doctor",
        "Check this machine: versions, devices, DeepSpeed, data, offline state.",
    ),
    "completion": Command(
        "commands.completion:completion",
        "Print what bash, zsh or tcsh completes of these commands.",
    ),
}
"""Every command by its name."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    if argv is None:
        open_streams()
    args = list(sys.argv[1:] if argv is None else argv)
    # the deepspeed launcher puts the local rank first or last; the environment has it as well
    args = [arg for arg in args if not arg.startswith("--local_rank=")]
    return ending(lambda: _run(args), told=is_first_rank)


def _run(args: Sequence[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(_overview(), file=sys.stdout if args else sys.stderr)
        return 0 if args else USAGE_ERROR
    if args[0] == "--version":
        print(simvq_moe.__version__)
        return 0
    if args[0] not in COMMANDS:
        from simvq_moe.config.loading import suggestion

        raise ConfigError(
            f"unknown command {args[0]!r}.{suggestion(args[0], list(COMMANDS))} "
            "simvq-moe --help lists them"
        )
    module, _, function = COMMANDS[args[0]].function.partition(":")
    try:
        return getattr(importlib.import_module(f"simvq_moe.{module}"), function)(args[1:])
    except ModuleNotFoundError as error:
        raise is_missing(error) or error from None


def _overview() -> str:
    lines = [f"  {name:10} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["usage: simvq-moe COMMAND ...", "", *lines, "", "simvq-moe COMMAND --help tells more"]
    )


if __name__ == "__main__":
    sys.exit(main())
