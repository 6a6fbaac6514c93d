"""Variables of a launcher may hold anything, and be inherited by a process that is alone."""

from __future__ import annotations

import pytest

from simvq_moe.engine.launched import check_launched, launched_rank, launched_ranks
from simvq_moe.errors import ConfigError

TWO = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_what_a_launcher_says_is_taken() -> None:
    check_launched(TWO | MEETING)
    assert (launched_rank(TWO), launched_ranks(TWO)) == (1, 2)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": ""},
        {"RANK": "3", "LOCAL_RANK": "3"},
        {"RANK": "1", "WORLD_SIZE": "1"},
        {"LOCAL_RANK": "-1"},
        {"OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": "1"},
    ],
)
def test_a_process_that_meets_nobody_is_the_first_rank(environ: dict[str, str]) -> None:
    check_launched(environ)
    assert (launched_rank(environ), launched_ranks(environ)) == (0, 1)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"RANK": "x"}, "RANK 'x'"),
        ({"RANK": "2"}, "RANK '2' of the environment is no number from 0 to 1"),
        ({"RANK": "-1"}, "RANK '-1'"),
        *(({"WORLD_SIZE": word}, f"WORLD_SIZE '{word}'") for word in ("two", "0", "-1", "1e3")),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE '999"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK 'x'"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        *(({"MASTER_PORT": word}, f"MASTER_PORT '{word}'") for word in ("x", "0", "65536")),
    ],
)
def test_what_no_launcher_says_is_one_line(wrong: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        check_launched(TWO | MEETING | wrong)
    assert "torchrun" in str(error.value)


def test_the_rank_of_a_process_that_meets_nobody_is_a_number_as_well() -> None:
    with pytest.raises(ConfigError, match="RANK 'x'"):
        check_launched({"RANK": "x"})


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_processes_of_mpirun_that_would_each_train_alone_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} 2: .*train alone"):
        check_launched({name: "2"})
    check_launched({name: "2"} | TWO | MEETING)
