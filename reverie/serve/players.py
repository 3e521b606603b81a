"""One player as the host sees it: what was ordered, what was shown, and the mailbox between threads
and the socket.
"""

import asyncio
import collections
import contextlib
import dataclasses
import json
import time
from typing import Any

import numpy as np

from reverie.serve.frame import View
from reverie.serve.messages import Set
from reverie.serve.session import StartFrom

RECORDED_FRAMES, RECORDED_BYTES = 2000, 64 << 20  # of the episode that may be saved


class Mailbox:
    """Between the threads that make frames and the coroutine that sends them: the newest frame, and
    short notices.

    A frame that was not fetched before the next one came is dropped, never queued.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop, self.dropped = loop, 0
        self._frame: bytes | None = None
        self._notices: collections.deque[str] = collections.deque(maxlen=32)
        self._full = asyncio.Event()

    def put(self, item: bytes | str) -> None:
        """From any thread."""
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
        """The oldest notice, else the newest frame; waits for one."""
        while not self._notices and self._frame is None:
            self._full.clear()
            await self._full.wait()
        if self._notices:
            return self._notices.popleft()
        frame, self._frame = self._frame, None
        assert frame is not None
        return frame


@dataclasses.dataclass
class RecordedFrame:
    """One frame as it will be saved."""

    image: np.ndarray
    action: np.ndarray
    reward: float | None  # None until the heads have spoken
    is_first: bool
    is_last: bool
    is_terminal: bool


class Client:
    """The orders of one page, and how far it has come.

    Only the engine's threads touch it after `Engine.join`.
    """

    def __init__(
        self,
        slot: int,
        mailbox: Mailbox,
        actions: int,
        rest: tuple[float, ...],
        pace: float,
        steps: int,
    ):
        self.slot, self.mailbox = slot, mailbox
        self.view: View = 'dream'
        self.source: StartFrom = 'game'
        self.by_agent, self.paused, self.steps, self.pace = False, False, steps, pace
        self.number = self.epoch = 0  # of the start; of how often the player has begun
        self.t = 0  # frames since the start
        self.single = 0  # frames still to make while paused
        self.held, self.id = rest, 0
        self.waiting: collections.deque[tuple[tuple[float, ...], int]] = collections.deque(maxlen=4)
        self.due = time.monotonic()
        self.over_at: float | None = None  # when the next episode begins
        self.ended = -1  # epoch that is over: its later frames are not shown
        self.wanted: Set | None = None  # a change that waits for its program to be compiled
        self.score, self.fresh = 0.0, True  # fresh: the next reward belongs to a new episode
        self.recorded: collections.deque[RecordedFrame] = collections.deque()
        self._room = 0

    def act(self, action: tuple[float, ...], number: int) -> None:
        """Every action is taken for at least one frame, so that a short press is not lost; only a
        few may wait.
        """
        self.waiting.append((action, number))

    def next_action(self) -> tuple[float, ...]:
        if self.waiting:
            self.held, self.id = self.waiting.popleft()
        return self.held

    def drop_queued(self) -> None:
        """Before a new episode: only what is held now counts."""
        if self.waiting:
            self.held, self.id = self.waiting.pop()
            self.waiting.clear()

    def wants_frame(self, now: float) -> bool:
        if self.over_at is not None:
            return False
        return self.single > 0 if self.paused else now >= self.due - 0.001

    def count_frame(self, now: float) -> None:
        """One frame is on its way."""
        self.t += 1
        self.single = max(0, self.single - 1)
        self.due = max(self.due + 1 / self.pace, now)

    def record(self, frame: RecordedFrame) -> None:
        """Keep a frame for saving: those of the running episode, up to a bound, the oldest go
        first.
        """
        if frame.is_first or not self.recorded:
            self.recorded.clear()
            self._room = max(2, min(RECORDED_FRAMES, RECORDED_BYTES // max(1, frame.image.nbytes)))
        self.recorded.append(frame)
        if len(self.recorded) > self._room:
            self.recorded.popleft()

    def attach_reward(self, reward: float, is_last: bool) -> float | None:
        """What is said only now of the newest recorded frame.

        -> its reward, None if that of a start, long known.
        """
        newest = self.recorded[-1]
        if newest.reward is not None:
            return None
        self.recorded[-1] = dataclasses.replace(
            newest, reward=reward, is_last=is_last, is_terminal=is_last
        )
        return reward

    def state(self) -> dict[str, Any]:
        """What a page shows of the settings."""
        return {
            'view': self.view,
            'by_agent': self.by_agent,
            'paused': self.paused,
            'steps': self.steps,
            'pace': self.pace,
            'source': self.source,
            'start': self.number,
        }

    def notify(self, **notice: Any) -> None:
        self.mailbox.put(json.dumps(notice))
