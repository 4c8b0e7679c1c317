"""The one line in front of the engine: native work runs here, one piece at a time, away from the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeVar

import kt_expert_native as native

from kt_expert_server.errors import DeadlinePassed, InternalError, InvalidRequest, OutOfCapacity, RequestCancelled

Result = TypeVar("Result")


class EngineQueue:
    """First come, first served. How much can wait is bounded by the members' credits."""

    def __init__(self, engine: native.Engine) -> None:
        self.engine = engine
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kt-engine")
        self._turn = asyncio.Lock()
        self._waiting = 0

    @property
    def depth(self) -> int:
        """Pieces waiting or running."""
        return self._waiting

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Waits for the engine. What an operation reserves for its own duration is reserved inside."""
        self._waiting += 1
        try:
            async with self._turn:
                yield
        finally:
            self._waiting -= 1

    async def run(self, work: Callable[[], Result]) -> Result:
        """Runs `work`, inside a turn, and turns the engine's errors into the server's.

        A caller that is cancelled still waits for `work` to end: the turn must not pass on while it runs.
        """
        future = asyncio.get_running_loop().run_in_executor(self._executor, work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])
            raise
        except native.InvalidArgument as error:
            raise InvalidRequest(str(error)) from error
        except native.Cancelled as error:
            raise RequestCancelled(str(error)) from error
        except native.DeadlineExceeded as error:
            raise DeadlinePassed(str(error)) from error
        except MemoryError as error:
            raise OutOfCapacity("the engine could not get the memory for this operation; send fewer tokens") from error
        except native.NativeError as error:
            raise InternalError(str(error)) from error
        finally:
            # An error's traceback holds this frame, the frame the future and the future the error: what `work` holds, such
            # as a ticket, would stay until the collector comes.
            del future

    def close(self) -> None:
        """Does not wait: what still runs has had its token cancelled and ends by itself."""
        self._executor.shutdown(wait=False, cancel_futures=True)
