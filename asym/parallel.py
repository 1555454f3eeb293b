"""Independent arms side by side, each in a process of its own.

A step of a small model is a long chain of short operations, which two threads cannot share well: two arms on a thread
each finish sooner than one after the other on both (`python -m asym bench` measures it).
"""

from collections.abc import Callable, Iterable
from typing import Any

from joblib import Parallel, delayed


def side_by_side(workers: int, function: Callable, calls: Iterable[tuple]) -> list[Any]:
    """The results of `function(*call)` for every call, in order, `workers` at a time; one worker is this process.

    Calls that come for the same run take turns. The first exception of a call is raised here, and ends the others.
    """
    return Parallel(n_jobs=workers, batch_size=1)(delayed(function)(*call) for call in calls)
