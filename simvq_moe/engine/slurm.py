"""Ranks that `srun` started, told in the variables that torch.distributed reads.

DeepSpeed's own SLURM launcher drops `--module` and sets no rank, so plain `srun python -m simvq_moe
train ...` is the way. https://slurm.schedmd.com/srun.html names the variables.
"""

from __future__ import annotations

import re
from collections.abc import MutableMapping

from simvq_moe.engine.launched import number_of
from simvq_moe.errors import ConfigError

FIRST_PORT, PORTS = 20_000, 10_000
STRIDE = 97
"""Ports of steps: FIRST_PORT + (job number + STRIDE * step number) modulo PORTS, so that jobs on
one node differ, and the steps of a job."""


def adopt_slurm(environ: MutableMapping[str, str]) -> None:
    """Set RANK, LOCAL_RANK, LOCAL_WORLD_SIZE, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in a step of
    several tasks.

    What another launcher, or the user, has set stays.

    Raises:
        ConfigError: the step's nodes are not named, so that no rank knows where the first one is,
            or a number of SLURM is none.
    """
    if "RANK" in environ or "SLURM_PROCID" not in environ:
        return
    tasks = number_of(environ, "SLURM_STEP_NUM_TASKS") or number_of(environ, "SLURM_NTASKS", 1)
    if tasks < 2:
        return
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or ""
    if not nodes and "MASTER_ADDR" not in environ:
        raise ConfigError(
            f"SLURM_JOB_NODELIST is not set in a step of {tasks} tasks: export MASTER_ADDR, the "
            "host of task 0"
        )
    if "SLURM_LOCALID" not in environ:
        raise ConfigError(f"SLURM_LOCALID is not set in a step of {tasks} tasks: start it by srun")
    environ["RANK"] = environ["SLURM_PROCID"]
    environ["LOCAL_RANK"] = environ["SLURM_LOCALID"]
    environ["WORLD_SIZE"] = str(tasks)
    environ.setdefault("MASTER_ADDR", first_host(nodes))
    job, step = (number_of(environ, f"SLURM_{name}_ID", most=2**63) for name in ("JOB", "STEP"))
    environ.setdefault("MASTER_PORT", str(FIRST_PORT + (job + STRIDE * step) % PORTS))
    per_node = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_NTASKS_PER_NODE")
    if per_node:
        here = tasks_of_node(per_node, number_of(environ, "SLURM_NODEID"))
        environ.setdefault("LOCAL_WORLD_SIZE", str(here))


def tasks_of_node(tasks: str, node: int) -> int:
    """Tasks of a node in SLURM's compressed list of them: node 2 of "4(x2),3" has 3."""
    numbers: list[int] = []
    for part in tasks.split(","):
        number, _, times = part.rstrip(")").partition("(x")
        numbers += [int(number)] * int(times or 1)
    return numbers[min(node, len(numbers) - 1)]


def first_host(nodes: str) -> str:
    """The first host of SLURM's compressed list: "gpu[007-009,12],login" gives "gpu007"."""
    prefix, bracket, rest = nodes.partition("[")
    if not bracket or "," in prefix:
        return nodes.split(",")[0]
    number = re.split(r"[-,\]]", rest)[0]
    # a suffix may follow the bracket: rack[1-2]-a
    return prefix + number + rest.partition("]")[2].split(",")[0]
