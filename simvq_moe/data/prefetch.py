"""Items of an iterator, made ahead of their use in a background thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetched(Generic[T]):
    """The items of an iterator in its order, with so many made ahead.

    An error of the iterator is raised where its item would have come. An item that carries the
    iterator's state carries the one that goes with it, however many were made ahead.

    Args:
        items: runs in one thread of its own, or with `ahead` 0 where the next item is asked for.
        ahead: items that are made while earlier ones are in use.
    """

    def __init__(self, items: Iterator[T], ahead: int) -> None:
        self.items = items
        self.thread = ThreadPoolExecutor(1, "prefetch") if ahead else None
        self.made: deque[Future[T]] = deque()
        for _ in range(ahead):
            self._make_another()

    def __iter__(self) -> Prefetched[T]:
        return self

    def __next__(self) -> T:
        if self.thread is None:
            return next(self.items)
        item = self.made.popleft()
        self._make_another()
        return item.result()

    def close(self) -> None:
        """Make no more items; one that is being made is not waited for."""
        if self.thread is not None:
            self.thread.shutdown(wait=False, cancel_futures=True)

    def _make_another(self) -> None:
        assert self.thread is not None
        self.made.append(self.thread.submit(next, self.items))
