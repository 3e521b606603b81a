"""The clockwork behind the server: which players move when, in two threads around one `Session`.

One thread gives the device work and never waits for its results; the other waits for finished
frames and puts them into the players' mailboxes. At most `AHEAD` frames are on their way at once.
"""

import collections
import concurrent.futures
import functools
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from reverie.evaluation.video import psnr
from reverie.serve import keys, messages
from reverie.serve.frame import Frame, View
from reverie.serve.messages import Act, Order, Set
from reverie.serve.players import Client, Mailbox, RecordedFrame
from reverie.serve.recording import Saver
from reverie.serve.session import Session
from reverie.types import UserError

log = logging.getLogger(__name__)
AHEAD = 2
PAUSE_AFTER_END_S = 0.5


class Engine:
    """Plays one `Session` for up to `session.slots` players. `start` it, `join` and `leave`, and
    `stop` it at the end.

    pace: frames per second of a new player. symbolic: pictures are grids of symbols, shown in
    colours.
    saver: writes recordings. on_failure: called once, from a thread, if the device or the session
    fails.
    """

    def __init__(
        self,
        session: Session,
        *,
        pace: float = 20.0,
        symbolic: bool = False,
        saver: Saver | None = None,
        on_failure: Callable[[BaseException], None] = lambda error: None,
    ):
        self.session, self.pace, self.symbolic, self.saver = session, pace, symbolic, saver
        self.on_failure = on_failure
        self._rest = keys.vector(
            session.agent.spec.actions, keys.rest(session.agent.spec.actions) or 0
        )
        self.players: dict[int, Client] = {}
        self.shown: collections.deque[float] = collections.deque(
            maxlen=200
        )  # when frames were finished
        self.made = 0
        self._lock, self._numbers = threading.Lock(), itertools.count(1)
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._room = threading.Semaphore(AHEAD)
        self._compiler = concurrent.futures.ThreadPoolExecutor(1, 'compile')
        self._programs: collections.deque[tuple[View, int, bool]] = (
            collections.deque()
        )  # to compile
        self._threads = [threading.Thread(target=t, daemon=True) for t in (self._run, self._read)]
        self._stopped = False

    def start(self) -> None:
        """Players may join. The other worlds are compiled meanwhile, so that a switch need not wait
        for it.
        """
        for thread in self._threads:
            thread.start()
        for view in self.session.views:
            self._want(view, self.session.steps)

    def stop(self) -> None:
        """Ends both threads; frames on their way are dropped."""
        self._stopped = True
        self._inbox.put(None)
        self._outbox.put(None)
        self._compiler.shutdown(wait=False, cancel_futures=True)
        for thread in self._threads:
            thread.join(10)

    # ---------------------------------------------------------------- from the server's thread

    def join(self, mailbox: Mailbox) -> Client | None:
        """A player with a place of its own, or None if all are taken."""
        with self._lock:
            slot = next((i for i in range(self.session.slots) if i not in self.players), None)
            if slot is None:
                return None
            player = Client(
                slot,
                mailbox,
                self.session.agent.spec.actions.size,
                self._rest,
                self.pace,
                self.session.steps,
            )
            player.source = 'data' if 'data' in self.session.sources else 'game'
            self.players[slot] = player
        self._inbox.put(functools.partial(self._begin, player, next(self._numbers)))
        return player

    def leave(self, player: Client) -> None:
        """The place is free at once."""
        with self._lock:
            if self.players.get(player.slot) is player:
                del self.players[player.slot]

    def order(self, player: Client, order: Order) -> None:
        self._inbox.put(functools.partial(self._obey, player, order))

    def fps(self) -> float:
        """Frames finished per second, over the last second or so."""
        now = time.monotonic()
        return float(sum(now - t < 1.0 for t in list(self.shown)))

    # ---------------------------------------------------------------- the thread that gives the dev

    def _run(self) -> None:
        try:
            while not self._stopped:
                self._take_orders()
                if not self._stopped:
                    self._advance(time.monotonic())
        except BaseException as error:  # the server must hear of it, whatever it is
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if self._stopped:
            return
        if not isinstance(error, UserError):  # which is one line, for whoever started the server
            log.error('playing stopped', exc_info=error)
        self.on_failure(error)

    def _take_orders(self) -> None:
        """Wait until somebody is due or orders come, and obey them."""
        wait = self._until_due()
        try:
            job = self._inbox.get(timeout=wait) if wait > 0 else self._inbox.get_nowait()
            while True:
                if job is not None:
                    job()
                job = self._inbox.get_nowait()
        except queue.Empty:
            return

    def _present(self) -> list[Client]:
        with self._lock:
            return list(self.players.values())

    def _until_due(self) -> float:
        now, soonest = time.monotonic(), 1.0
        for player in self._present():
            if player.over_at is not None:
                soonest = min(soonest, player.over_at - now)
            elif player.paused:
                soonest = 0.0 if player.single else soonest
            else:
                soonest = min(soonest, player.due - now)
        return max(0.0, soonest)

    def _advance(self, now: float) -> None:
        """One frame for everybody who is due, together where they are in the same world.

        Who is due within half a frame comes along, so that players of one pace share every pass
        from then on.
        """
        groups: dict[tuple[Any, int], list[Client]] = {}
        present = self._present()
        for player in present:
            if player.over_at is not None and now >= player.over_at and not player.paused:
                self._begin(player, next(self._numbers))
            elif player.wants_frame(now) and player.epoch:
                groups.setdefault((player.view, player.steps), []).append(player)
        for player in present:
            group = groups.get((player.view, player.steps), [])
            if (
                group
                and player not in group
                and player.epoch
                and player.wants_frame(now + 0.5 / player.pace)
            ):
                group.append(player)
        for (view, steps), players in groups.items():
            n, size = self.session.slots, self.session.agent.spec.actions.size
            action, by_agent, rows = (
                np.zeros((n, size), np.float32),
                np.zeros(n, bool),
                np.zeros(n, bool),
            )
            for player in players:
                action[player.slot], rows[player.slot] = player.next_action(), True
                by_agent[player.slot] = player.by_agent
                player.count_frame(now)
            self._room.acquire()
            frame = self.session.frame(action, by_agent, rows, view, steps)
            self._send(frame, [(p, p.slot, self._header(p)) for p in players])
        self._pass_on()

    def _pass_on(self) -> None:
        """What the session has to say."""
        for slot, text in self.session.notices():
            if slot in self.players:
                self.players[slot].notify(type='notice', text=text)

    def _header(self, player: Client) -> dict[str, Any]:
        """What is known of a frame when it is ordered."""
        return {'t': player.t, 'epoch': player.epoch, 'id': player.id, **player.state()}

    def _send(self, frame: Frame, to: list[tuple[Client, int, dict[str, Any]]]) -> None:
        self._outbox.put(functools.partial(self._show, frame, to))

    def _begin(self, player: Client, number: int) -> None:
        """A new episode from the start `number`."""
        if self.players.get(player.slot) is not player:
            return
        player.number, player.epoch, player.t = number, player.epoch + 1, 0
        player.over_at, player.due = None, time.monotonic() + 1 / player.pace
        player.drop_queued()
        self._room.acquire()
        frame = self.session.start(player.slot, number, player.source, player.view == 'real')
        self._send(frame, [(player, 0, self._header(player))])

    def _over(self, player: Client, epoch: int) -> None:
        if player.epoch == epoch and player.over_at is None:
            player.over_at = time.monotonic() + PAUSE_AFTER_END_S

    def _obey(self, player: Client, order: Order) -> None:
        if self.players.get(player.slot) is not player:
            return
        if isinstance(order, Act):
            player.act(order.action, order.id)
        elif isinstance(order, Set):
            self._set(player, order)
        elif order.what == 'step':
            player.paused, player.single = True, min(player.single + 1, 4)
            if player.over_at is not None:
                self._begin(player, next(self._numbers))
        elif order.what in ('reset', 'again'):
            self._begin(player, next(self._numbers) if order.what == 'reset' else player.number)
        elif self.saver is not None:
            # by the thread that writes the tape
            self._outbox.put(
                functools.partial(
                    self.saver.save, order.what, player, self.symbolic, self.session.agent.spec
                )
            )
        if not isinstance(order, Act):
            player.notify(type='state', **player.state())

    def _set(self, player: Client, order: Set) -> None:
        view, steps = self._after(player, order)
        if not self.session.ready(view, steps) and order.field in ('view', 'steps', 'by_agent'):
            player.notify(type='notice', text='compiling, a moment …')
            player.wanted = order  # of several changes the last one counts
            self._want(view, steps, at_once=True)
            return
        setattr(player, order.field, order.value)
        player.due = min(player.due, time.monotonic() + 1 / player.pace)
        if order.field == 'view':
            number = player.number
            if (
                view != 'dream' and player.source != 'game'
            ):  # a recording cannot be played on: both need a game
                player.source, number = 'game', next(self._numbers)
            self._begin(player, number)
        elif order.field == 'source':
            if order.value == 'data' and player.view != 'dream':
                player.view = 'dream'
            self._begin(player, next(self._numbers))

    def _after(self, player: Client, order: Set) -> tuple[View, int]:
        """The world and K that an order leads to."""
        return (
            order.value if order.field == 'view' else player.view,
            order.value if order.field == 'steps' else player.steps,
        )

    def _want(self, view: View, steps: int, at_once: bool = False) -> None:
        """Have the programs of a world compiled, a person's first; `at_once`: before all others
        that wait.
        """
        for plays in (True, False) if at_once else (False, True):
            program = (view, steps, plays)
            self._programs.appendleft(program) if at_once else self._programs.append(program)
            self._compiler.submit(self._compile)

    def _compile(self) -> None:
        try:
            self.session.compile(*self._programs.popleft())
            self._inbox.put(self._resume)
        except BaseException as error:
            self._fail(error)

    def _resume(self) -> None:
        """What players wanted may be compiled now."""
        for player in self._present():
            order = player.wanted
            if order is not None and self.session.ready(*self._after(player, order)):
                player.wanted = None
                self._obey(player, order)

    # ---------------------------------------------------------------- the thread that waits for fra

    def _read(self) -> None:
        try:
            while (job := self._outbox.get()) is not None:
                job()
        except BaseException as error:
            self._fail(error)

    def _show(self, frame: Frame, to: list[tuple[Client, int, dict[str, Any]]]) -> None:
        host = jax.device_get(frame)
        self._room.release()
        for player, row, header in to:
            if self.players.get(player.slot) is not player or player.ended == header['epoch']:
                continue
            self.made += 1
            self.shown.append(time.monotonic())
            one = jax.tree.map(lambda x, row=row: x[row], host)
            player.mailbox.put(self._message(player, one, header))

    def _message(self, player: Client, one: Any, header: dict[str, Any]) -> bytes:
        """Account for a frame of one player and put it into words.

        In a late world the heads speak of the frame before; where they end the episode, that one
        stays on the screen.
        """
        heads_lag = header['t'] > 0 and self.session.heads_lag(header['view'])
        last = bool(one.is_last) and not (
            heads_lag and header['t'] == 1
        )  # a start is never the end
        over = last or (one.real_last is not None and bool(one.real_last))
        image, spoken = one.image, float(one.reward)
        reward = player.attach_reward(spoken, last) if heads_lag else spoken
        if heads_lag:
            player.score += reward or 0.0
            if last and one.real is None:
                image, header['t'] = player.recorded[-1].image, header['t'] - 1
            else:
                player.record(RecordedFrame(image, one.action, None, False, False, False))
        else:
            first = header['t'] == 0 or player.fresh
            player.score = 0.0 if first else player.score + spoken
            player.record(
                RecordedFrame(
                    image, one.action, reward, first, over, over and float(one.cont) < 0.5
                )
            )
        player.fresh = over
        if over and header['view'] != 'real':
            player.ended = header['epoch']
            self._inbox.put(functools.partial(self._over, player, header['epoch']))
        header |= {
            'reward': reward, 'score': player.score, 'cont': float(one.cont), 'over': over,
            'value': None if one.value is None else float(one.value),
            'probs': None if one.probs is None else [round(float(p), 4) for p in one.probs],
            'action': [round(float(x), 3) for x in one.action], 'dropped': player.mailbox.dropped,
        }  # fmt: skip
        pictures = [messages.picture(image, self.symbolic)]
        if one.real is not None:
            pictures.append(messages.picture(one.real, self.symbolic))
            if one.image.ndim == 3:
                header['psnr'] = float(psnr(one.real[None] / 255, one.image[None] / 255)[0])
        return messages.pack(header, pictures)
