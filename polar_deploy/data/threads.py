"""Work on many pictures at once: decoding and resizing let go of Python's lock, so threads are enough."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

from PIL import Image

Item = TypeVar("Item")
Result = TypeVar("Result")


def parallel(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """`work` of each item, in their order, on as many threads as there are processors for this process."""
    return list(_pool(os.getpid()).map(work, items))


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """One for each process: a fork has none of its parent's threads."""
    Image.init()  # else each thread does so when it meets a rarer format, and some take it for unknown meanwhile
    return ThreadPoolExecutor(min(32, len(os.sched_getaffinity(process))), thread_name_prefix="pictures")
