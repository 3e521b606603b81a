"""Mailboxes of one player between the threads that make frames and the coroutines of its socket:
frames and notices on their way out, orders on their way in.
"""

import asyncio
import collections
import contextlib
import threading

from reverie.serve.messages import Act, Do, Order

WAITING = 4  # actions, and single frames, that may wait


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


class Orders:
    """Orders that wait for the engine, in the order in which they came.

    Where one makes an older one pointless, only the newer is kept: a flood is as few orders as it
    has different ones.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[Order] = []

    def put(self, order: Order) -> bool:
        """Add an order; returns whether it is the only one, so that the engine must be told."""
        with self._lock:
            alike = [other for other in self._waiting if _kind(other) == _kind(order)]
            if len(alike) >= (WAITING if _kind(order) in ('act', 'step') else 1):
                self._waiting.remove(alike[0])
            self._waiting.append(order)
            return len(self._waiting) == 1

    def take(self) -> list[Order]:
        """Take out all of them."""
        with self._lock:
            orders, self._waiting = self._waiting, []
        return orders


def _kind(order: Order) -> str:
    if isinstance(order, Act):
        return 'act'
    return order.what if isinstance(order, Do) else f'set {order.field}'
