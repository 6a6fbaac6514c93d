"""What a launcher has told this process by variables of its environment, which anybody may set."""

from __future__ import annotations

import os
from collections.abc import Mapping

from simvq_moe.config.conversion import shown
from simvq_moe.errors import ConfigError

LARGEST = 2**31 - 1
OF_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""How Open MPI, MPICH and MVAPICH2 say how many processes they have started."""
WAY_OUT = "start by deepspeed, torchrun or srun, which set it, or unset it"


def number_of(
    environ: Mapping[str, str], name: str, default: int = 0, *, least: int = 0, most: int = LARGEST
) -> int:
    """The whole number that a variable holds; one that is empty says nothing.

    Raises:
        ConfigError: it holds something else.
    """
    word = environ.get(name) or str(default)
    number = int(word) if word.removeprefix("-").isdecimal() and len(word) < 20 else least - 1
    if not least <= number <= most:
        raise ConfigError(
            f"{name} {shown(word)} of the environment is no number from {least} to {most:,}: "
            f"{WAY_OUT}"
        )
    return number


def launched_ranks(environ: Mapping[str, str] = os.environ) -> int:
    """Number of ranks that a launcher has started; 1 without one."""
    return number_of(environ, "WORLD_SIZE", 1, least=1)


def launched_rank(environ: Mapping[str, str] = os.environ) -> int:
    """Rank that a launcher has given this process; 0 without one, or where it has nobody to meet:
    a process that another one has started may inherit its rank."""
    ranks = launched_ranks(environ)
    rank = number_of(environ, "RANK", most=ranks - 1 if ranks > 1 else LARGEST)
    return rank if ranks > 1 else 0


def check_launched(environ: Mapping[str, str]) -> None:
    """Raise `ConfigError` where ranks would not find each other, or not know of each other."""
    ranks = launched_ranks(environ)
    launched_rank(environ)
    number_of(environ, "LOCAL_RANK", least=-1)
    if "RANK" not in environ:
        for name in OF_MPI:
            if (started := number_of(environ, name, 1)) > 1:
                raise ConfigError(
                    f"{name} {started}: each of these processes would train alone: start by "
                    "deepspeed, torchrun or srun, or set RANK, LOCAL_RANK, WORLD_SIZE, "
                    "MASTER_ADDR and MASTER_PORT in each"
                )
    elif ranks > 1:
        if not environ.get("MASTER_ADDR"):
            raise ConfigError(
                f"MASTER_ADDR is not set beside WORLD_SIZE {ranks}: give the host of rank 0, or "
                "start by deepspeed, torchrun or srun"
            )
        number_of(environ, "MASTER_PORT", least=1, most=65_535)
