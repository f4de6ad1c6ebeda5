"""Threads for the work of requests, each caller's own: whoever sends much that lasts waits for their own requests, and nobody else's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar, TypeVarTuple

from anyio import CapacityLimiter, to_thread
from anyio.lowlevel import RunVar

MAX_CALLER_THREADS = 16  # that work for one caller at a time; there are as many callers as keys

Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")
_limiters: RunVar[dict[str, CapacityLimiter]] = RunVar("threads by caller")  # of each event loop


async def run_for(caller: str, function: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
    """What the function returns, or raises. It runs outside the event loop, when a thread of this caller is free."""
    try:
        limiters = _limiters.get()
    except LookupError:
        limiters = {}
        _limiters.set(limiters)
    if caller not in limiters:
        limiters[caller] = CapacityLimiter(MAX_CALLER_THREADS)
    return await to_thread.run_sync(partial(function, *arguments), limiter=limiters[caller])
