"""Ranks that torchrun has started again meet in a part of its store that no dead rank has written.

torchrun's agent keeps one store over all restarts (pytorch/pytorch#135712): the addresses of ranks
that were killed are still in it, and a process group that reads them hangs.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

SECONDS_BETWEEN_LOOKS = 0.01


def agent_store(environ: Mapping[str, str], timeout: timedelta) -> Store | None:
    """The part of the agent's store that this start of the ranks has alone; None: no agent has one.

    Raises:
        TimeoutError: not all ranks came.
    """
    if environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):
        return None
    address, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=timeout)
    name = name_of_start(store, int(environ["RANK"]), int(environ["WORLD_SIZE"]), timeout)
    return PrefixStore(f"simvq_moe/start/{name}", store)


def name_of_start(store: Store, rank: int, size: int, timeout: timedelta) -> str:
    """What the ranks of one start call it; every rank must call it.

    The count of restarts is no such name, because agents on several machines count on their own.
    Each rank says a word that is new, and believes an answer of rank 0 that repeats it alone.

    Args:
        store: may hold what ranks of earlier starts said, of any number.

    Raises:
        TimeoutError: not all ranks came.
    """
    end = time.monotonic() + timeout.total_seconds()
    word = uuid.uuid4().hex
    if rank:
        store.set(f"simvq_moe/word/{rank}", word)
        while True:
            answered, _, name = _read(store, f"simvq_moe/answer/{rank}").partition(" ")
            if answered == word:
                store.set(f"simvq_moe/thanks/{rank}", name)
                return name
            _wait(end, f"rank {rank} has no answer of rank 0")
    absent = set(range(1, size))
    while absent:
        for other in sorted(absent):
            # a word of an earlier start is answered too, for nobody, until the new one is there
            said = _read(store, f"simvq_moe/word/{other}")
            store.set(f"simvq_moe/answer/{other}", f"{said} {word}")
            if _read(store, f"simvq_moe/thanks/{other}") == word:
                absent.remove(other)
        if absent:
            _wait(end, f"ranks {sorted(absent)} have not come")
    return word


def _read(store: Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _wait(end: float, why: str) -> None:
    if time.monotonic() > end:
        raise TimeoutError(f"{why}: look at the logs of the other machines")
    time.sleep(SECONDS_BETWEEN_LOOKS)
