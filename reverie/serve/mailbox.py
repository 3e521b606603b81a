"""Mailbox of one player, between the threads that make frames and the coroutine that sends."""

import asyncio
import collections
import contextlib


class Mailbox:
    """Holds the newest frame, and short notices.

    A frame that was not fetched before the next one came is dropped, never queued.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop, self.dropped = loop, 0
        self._frame: bytes | None = None
        self._notices: collections.deque[str] = collections.deque(maxlen=32)
        self._full = asyncio.Event()

    def put(self, item: bytes | str) -> None:
        """Leave a frame (bytes) or a notice, from any thread."""
        with contextlib.suppress(RuntimeError):  # the server has stopped, and its loop with it
            self.loop.call_soon_threadsafe(self._put, item)

    def _put(self, item: bytes | str) -> None:
        if isinstance(item, str):
            self._notices.append(item)
        else:
            self.dropped += self._frame is not None
            self._frame = item
        self._full.set()

    async def get(self) -> bytes | str:
        """Take out the oldest notice, else the newest frame; waits for one."""
        while not self._notices and self._frame is None:
            self._full.clear()
            await self._full.wait()
        if self._notices:
            return self._notices.popleft()
        frame, self._frame = self._frame, None
        assert frame is not None
        return frame
