"""One player as the host sees it: its settings and orders, and the episode it has been shown."""

import collections
import dataclasses
import json
import time
from typing import Any, NamedTuple

import numpy as np

from reverie.serve.frame import HostFrame, View
from reverie.serve.mailbox import WAITING, Mailbox, Orders
from reverie.serve.messages import Set
from reverie.serve.session import StartFrom

RECORDED_FRAMES = 2000  # of the episode that may be saved
RECORDED_BYTES = 64 << 20


@dataclasses.dataclass
class RecordedFrame:
    """One frame as it will be saved."""

    image: np.ndarray
    action: np.ndarray
    reward: float | None  # None until the heads have spoken
    is_first: bool
    is_last: bool
    is_terminal: bool


class ShownFrame(NamedTuple):
    """A frame accounted for: the picture to show, and what is known at it."""

    image: np.ndarray
    t: int  # frames since the start
    reward: float | None  # None while it is not known, and of a start that was shown before
    score: float
    over: bool


class Recording:
    """Frames and score of the running episode, up to a bound; the oldest frames go first."""

    def __init__(self) -> None:
        self.frames: collections.deque[RecordedFrame] = collections.deque()
        self.score = 0.0
        self._fresh = True  # the next reward belongs to a new episode
        self._room = 0

    def take(self, frame: HostFrame, t: int, heads_lag: bool) -> ShownFrame:
        """Account for the player's next frame.

        heads_lag: its reward and is_last are of the frame before; where they end the episode, that
        one stays on the screen.
        """
        return self._pipelined(frame, t) if heads_lag else self._synchronous(frame, t)

    def _synchronous(self, frame: HostFrame, t: int) -> ShownFrame:
        first = t == 0 or self._fresh
        reward, over = float(frame.reward), bool(frame.is_last or frame.real_last)
        self.score = 0.0 if first else self.score + reward
        terminal = over and float(frame.cont) < 0.5
        self._record(RecordedFrame(frame.image, frame.action, reward, first, over, terminal))
        self._fresh = over
        return ShownFrame(frame.image, t, reward, self.score, over)

    def _pipelined(self, frame: HostFrame, t: int) -> ShownFrame:
        last = bool(frame.is_last) and t > 1  # a start is never the end
        reward = self._attach_reward(float(frame.reward), last)
        self.score += reward or 0.0
        image = frame.image
        if last and frame.real is None:
            image, t = self.frames[-1].image, t - 1
        else:
            self._record(RecordedFrame(image, frame.action, None, False, False, False))
        self._fresh = over = last or bool(frame.real_last)
        return ShownFrame(image, t, reward, self.score, over)

    def _record(self, frame: RecordedFrame) -> None:
        if frame.is_first or not self.frames:
            self.frames.clear()
            fit = RECORDED_BYTES // max(1, frame.image.nbytes)
            self._room = max(2, min(RECORDED_FRAMES, fit))
        self.frames.append(frame)
        if len(self.frames) > self._room:
            self.frames.popleft()

    def _attach_reward(self, reward: float, is_last: bool) -> float | None:
        """Attach the late reward to the newest frame.

        Returns None for a start frame, whose reward is already set.
        """
        newest = self.frames[-1]
        if newest.reward is not None:
            return None
        self.frames[-1] = dataclasses.replace(
            newest, reward=reward, is_last=is_last, is_terminal=is_last
        )
        return reward


@dataclasses.dataclass(eq=False)
class Client:
    """Settings and orders of one page, and how far it has come.

    Only the engine's threads touch it after `Engine.join`.
    """

    slot: int
    mailbox: Mailbox
    held: tuple[float, ...]  # action of the next frames; first that of no key
    pace: float  # frames per second
    steps: int
    source: StartFrom = 'game'
    view: View = 'dream'
    by_agent: bool = False
    paused: bool = False
    number: int = 0  # of the start
    wanted_start: int | None = None  # number of the one to come: until then there are no frames
    start_at: float = 0.0  # when it may
    epoch: int = 0  # starts so far
    t: int = 0  # frames since the start
    single: int = 0  # frames still to make while paused
    id: int = 0  # of the newest order that was obeyed
    over_at: float | None = None  # when the next episode begins
    ended: int = -1  # epoch that is over: its later frames are not shown
    wanted: Set | None = None  # a change that waits for its program to be compiled
    due: float = dataclasses.field(default_factory=time.monotonic)
    at: float = 0.0  # when the newest frame was due; pages show it that much after the one before
    recording: Recording = dataclasses.field(default_factory=Recording)
    orders: Orders = dataclasses.field(default_factory=Orders)

    def __post_init__(self) -> None:
        self._waiting = collections.deque[tuple[tuple[float, ...], int]](maxlen=WAITING)

    def act(self, action: tuple[float, ...], number: int) -> None:
        """Queue an action: each counts for one frame at least, so that a short press is not lost.

        Only a few may wait. One that changes other entries than the newest that waits takes its
        place: keys of several parts that are pressed together count from the same frame on.
        """
        if self._waiting:
            before = self._waiting[-2][0] if len(self._waiting) > 1 else self.held
            newest = self._waiting[-1][0]
            if all(a == b or b == c for a, b, c in zip(before, newest, action, strict=True)):
                self._waiting.pop()
        self._waiting.append((action, number))

    def next_action(self) -> tuple[float, ...]:
        """The action of the next frame."""
        if self._waiting:
            self.held, self.id = self._waiting.popleft()
        return self.held

    def start_number(self) -> int:
        """Number of the start that is played, or will be in a moment."""
        return self.number if self.wanted_start is None else self.wanted_start

    def begin(self, number: int) -> None:
        """Begin an episode; of the actions that wait, only what is held now counts."""
        self.number, self.t, self.wanted_start = number, 0, None
        self.epoch += 1
        self.over_at, self.at = None, time.monotonic()
        self.due = self.at + 1 / self.pace
        if self._waiting:
            self.held, self.id = self._waiting.pop()
            self._waiting.clear()

    def step_once(self) -> None:
        """Pause, and make one more frame; only a few may be asked for."""
        self.paused, self.single = True, min(self.single + 1, WAITING)

    def wants_frame(self, now: float) -> bool:
        """Whether a frame is due."""
        if self.over_at is not None or self.wanted_start is not None or not self.epoch:
            return False
        return self.single > 0 if self.paused else now >= self.due - 0.001

    def count_frame(self, now: float) -> None:
        """Note that one frame is on its way."""
        self.t += 1
        self.single = max(0, self.single - 1)
        self.at = now if self.paused else max(self.due, now - 1 / self.pace)
        self.due = max(self.due + 1 / self.pace, now)

    def header(self) -> dict[str, Any]:
        """Header of a frame, as far as it is known when the frame is ordered."""
        at = round(1000 * self.at, 1)  # milliseconds
        return {'t': self.t, 'epoch': self.epoch, 'id': self.id, 'at': at, **self.state()}

    def state(self) -> dict[str, Any]:
        """Settings as a page shows them."""
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
        """Send the page a notice."""
        self.mailbox.put(json.dumps(notice))
