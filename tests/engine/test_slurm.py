"""Tasks of an srun step become ranks that find each other."""

from __future__ import annotations

import pytest
import torch

from simvq_moe.engine.slurm import adopt_slurm, first_host, tasks_of_node
from simvq_moe.engine.world import share_cores
from simvq_moe.errors import ConfigError

STEP = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4"}
NODES = {"SLURM_STEP_NODELIST": "gpu[007-008]", "SLURM_JOB_ID": "123456"}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu007", "gpu007"),
        ("gpu007,gpu009", "gpu007"),
        ("gpu[007-009,12],login", "gpu007"),
        ("gpu[3,5]", "gpu3"),
        ("head,gpu[3,5]", "head"),
        ("rack[1-2]-a,rack7-b", "rack1-a"),
    ],
)
def test_the_first_host_of_a_compressed_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_a_step_of_several_tasks_sets_what_torch_reads() -> None:
    environ = STEP | NODES
    adopt_slurm(environ)
    expected = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}
    assert environ.items() >= (expected | {"MASTER_ADDR": "gpu007", "MASTER_PORT": "23456"}).items()


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "gpu1"},  # inside salloc, without srun
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"},
        STEP | NODES | {"RANK": "0", "WORLD_SIZE": "2"},  # torchrun inside of a step
    ],
)
def test_what_is_no_step_of_several_tasks_is_left_alone(environ: dict[str, str]) -> None:
    before = dict(environ)
    adopt_slurm(environ)
    assert environ == before


def test_the_users_own_address_is_kept_and_a_missing_one_is_named() -> None:
    environ = STEP | NODES | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
    adopt_slurm(environ)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("10.0.0.1", "1234")
    with pytest.raises(ConfigError, match="export MASTER_ADDR"):
        adopt_slurm(dict(STEP))


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"SLURM_STEP_NUM_TASKS": "x"}, "SLURM_STEP_NUM_TASKS 'x'"),
        ({"SLURM_JOB_ID": "1.5"}, "SLURM_JOB_ID '1.5'"),
        ({"SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_NODEID": "a"}, "SLURM_NODEID 'a'"),
    ],
)
def test_what_is_no_number_is_named(wrong: dict[str, str], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        adopt_slurm(STEP | NODES | wrong)
    alone = {name: value for name, value in (STEP | NODES).items() if name != "SLURM_LOCALID"}
    with pytest.raises(ConfigError, match="SLURM_LOCALID is not set"):
        adopt_slurm(alone)


@pytest.mark.parametrize(
    ("tasks", "node", "here"), [("4", 0, 4), ("4(x2),3", 1, 4), ("4(x2),3", 2, 3), ("8", 3, 8)]
)
def test_the_tasks_of_a_node_in_a_compressed_list(tasks: str, node: int, here: int) -> None:
    assert tasks_of_node(tasks, node) == here


@pytest.mark.parametrize(
    ("told", "threads"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "4"}, 2),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_NODEID": "1"}, 4),
        ({"SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_CPUS_PER_TASK": "3"}, 3),
        ({"SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_CPUS_PER_TASK": "16"}, 8),  # not bound
    ],
)
def test_tasks_of_a_node_share_its_cores(told: dict[str, str], threads: int) -> None:
    before = torch.get_num_threads()
    environ = STEP | NODES | told
    try:
        torch.set_num_threads(8)
        adopt_slurm(environ)
        share_cores(environ)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_steps_of_a_job_and_neighbouring_jobs_meet_at_other_ports() -> None:
    ports = set()
    for job in ("123456", "123457"):
        for step in ("0", "1"):
            environ = STEP | NODES | {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step}
            adopt_slurm(environ)
            ports.add(environ["MASTER_PORT"])
    assert len(ports) == 4
