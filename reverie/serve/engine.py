"""The engine behind the server: two threads around one `Session`.

One thread gives the device work and never waits for its results; the other waits for finished
frames and puts them into the players' mailboxes. At most `ON_THE_WAY` frames wait for their results
at once.
"""

import collections
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

from reverie.serve import keys, schedule
from reverie.serve.compiler import ProgramCompiler
from reverie.serve.frame import Frame, HostFrame, View
from reverie.serve.guard import Bucket
from reverie.serve.mailbox import Mailbox
from reverie.serve.messages import Act, Order, Set, frame_message
from reverie.serve.players import Client
from reverie.serve.recording import RecordingSaver
from reverie.serve.session import Session
from reverie.types import UserError

log = logging.getLogger(__name__)
ON_THE_WAY = 2
PAUSE_AFTER_END_S = 0.5
STARTS, STARTS_AT_ONCE = 2.0, 4.0  # of one place, per second and at once

Job = Callable[[], None]
Addressees = list[tuple[Client, int, dict[str, Any]]]  # player, its row of the frame, the header


class Engine:
    """Plays one `Session` for up to `session.slots` players.

    `start` it, `join` and `leave`, and `stop` it at the end.

    Args:
        pace: frames per second of a new player.
        symbolic: pictures are grids of symbols, shown in colours.
        saver: writes recordings.
        on_failure: called once, from a thread, if the device or the session fails.
    """

    def __init__(
        self,
        session: Session,
        *,
        pace: float = 20.0,
        symbolic: bool = False,
        saver: RecordingSaver | None = None,
        on_failure: Callable[[BaseException], None] = lambda error: None,
    ):
        self.session, self.saver = session, saver
        self.pace, self.symbolic = pace, symbolic
        self.on_failure = on_failure
        self.players: dict[int, Client] = {}
        self.made = 0
        self._shown: collections.deque[float] = collections.deque(maxlen=200)  # when, newest last
        self._lock = threading.Lock()
        self._starts = itertools.count(1)
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._room = threading.Semaphore(ON_THE_WAY)
        self._start_pace = [Bucket(STARTS, STARTS_AT_ONCE) for _ in range(session.slots)]
        resume = functools.partial(self._inbox.put, self._resume)
        self._compiler = ProgramCompiler(session, resume, self._fail)
        self._threads = [threading.Thread(target=t, daemon=True) for t in (self._run, self._read)]
        self._stopped = False

    # ---------------------------------------------------------------- from the server's thread

    def start(self) -> None:
        """Let players join; the other views are compiled meanwhile, so that no switch waits."""
        for thread in self._threads:
            thread.start()
        for view in self.session.views:
            self._compiler.want(view, self.session.steps)

    def stop(self) -> None:
        """End both threads; frames on their way are dropped."""
        self._stopped = True
        self._inbox.put(None)
        self._outbox.put(None)
        self._compiler.stop()
        for thread in self._threads:
            thread.join(10)

    def join(self, mailbox: Mailbox) -> Client | None:
        """A player with a place of its own, or None if all are taken."""
        session, space = self.session, self.session.agent.spec.actions
        with self._lock:
            slot = next((i for i in range(session.slots) if i not in self.players), None)
            if slot is None:
                return None
            rest = keys.vector(space, keys.rest(space))
            player = Client(slot, mailbox, rest, self.pace, session.steps)
            player.source = 'data' if 'data' in session.sources else 'game'
            self.players[slot] = player
        self._inbox.put(functools.partial(self._want_start, player))
        return player

    def leave(self, player: Client) -> None:
        """Free the player's place, at once."""
        with self._lock:
            if self._plays(player):
                del self.players[player.slot]

    def order(self, player: Client, order: Order) -> None:
        """Have an order obeyed before the next frame."""
        if player.orders.put(order):
            self._inbox.put(functools.partial(self._obey_all, player))

    def fps(self) -> float:
        """Frames finished per second, over the last second or so."""
        now = time.monotonic()
        return float(sum(now - t < 1.0 for t in list(self._shown)))

    def _plays(self, player: Client) -> bool:
        return self.players.get(player.slot) is player

    def _present(self) -> list[Client]:
        with self._lock:
            return list(self.players.values())

    def _fail(self, error: BaseException) -> None:
        if self._stopped:
            return
        if not isinstance(error, UserError):  # which is one line, for whoever started the server
            log.error('playing stopped', exc_info=error)
        self.on_failure(error)

    # ---------------------------------------------------------------- the thread that gives work

    def _run(self) -> None:
        try:
            while not self._stopped:
                self._take_orders()
                if not self._stopped:
                    self._advance(time.monotonic())
        except BaseException as error:  # the server must hear of it, whatever it is
            self._fail(error)

    def _take_orders(self) -> None:
        """Wait until some player is due or orders come, and obey them."""
        wait = schedule.until_due(self._present(), time.monotonic())
        try:
            job = self._inbox.get(timeout=wait) if wait > 0 else self._inbox.get_nowait()
            while True:
                if job is not None:
                    job()
                job = self._inbox.get_nowait()
        except queue.Empty:
            return

    def _advance(self, now: float) -> None:
        """Make one frame for every player who is due, and pass on what the session has to say."""
        players = self._present()
        for player in schedule.ended(players, now):
            self._want_start(player)
        # one at a time: a start costs several frames, which others may be due for
        if (starting := schedule.next_start(players, now)) is not None:
            self._begin(starting)
        for (view, steps), group in schedule.groups(players, now).items():
            self._frame(group, view, steps, now)
        for slot, text in self.session.notices():
            if slot in self.players:
                self.players[slot].notify(type='notice', text=text)

    def _frame(self, players: list[Client], view: View, steps: int, now: float) -> None:
        """One forward pass for players of one view and K."""
        n, size = self.session.slots, self.session.agent.spec.actions.size
        action = np.zeros((n, size), np.float32)
        by_agent, rows = np.zeros(n, bool), np.zeros(n, bool)
        for player in players:
            action[player.slot], rows[player.slot] = player.next_action(), True
            by_agent[player.slot] = player.by_agent
            player.count_frame(now)
        self._room.acquire()
        frame = self.session.frame(action, by_agent, rows, view, steps)
        self._send(frame, [(player, player.slot, player.header()) for player in players])

    def _want_start(self, player: Client, number: int | None = None) -> None:
        """Have an episode begin before the player's next frame: a new one, or again `number`.

        A place may begin a few at once and then `STARTS` per second, whoever has it.
        """
        if player.wanted_start is None:
            player.start_at = time.monotonic() + self._start_pace[player.slot].reserve()
        player.wanted_start = next(self._starts) if number is None else number

    def _begin(self, player: Client) -> None:
        """Begin the episode that the player waits for."""
        number = player.wanted_start
        if number is None or not self._plays(player):
            return
        player.begin(number)
        self._room.acquire()
        frame = self.session.start(player.slot, number, player.source, player.view == 'real')
        self._send(frame, [(player, 0, player.header())])

    def _send(self, frame: Frame, to: Addressees) -> None:
        self._outbox.put(functools.partial(self._show, frame, to))

    def _end(self, player: Client, epoch: int) -> None:
        """Have the next episode begin after a pause."""
        if player.epoch == epoch and player.over_at is None:
            player.over_at = time.monotonic() + PAUSE_AFTER_END_S

    def _obey_all(self, player: Client) -> None:
        """Obey what the player's page has ordered, and answer once."""
        orders = player.orders.take()
        for order in orders:
            self._obey(player, order)
        if not all(isinstance(order, Act) for order in orders):
            player.notify(type='state', **player.state())

    def _obey(self, player: Client, order: Order) -> None:
        if not self._plays(player):
            return
        if isinstance(order, Act):
            player.act(order.action, order.id)
        elif isinstance(order, Set):
            self._set(player, order)
        elif order.what == 'step':
            player.step_once()
            if player.over_at is not None:
                self._want_start(player)
        elif order.what == 'reset':
            self._want_start(player)
        elif order.what == 'again':
            self._want_start(player, player.start_number())
        elif self.saver is not None:  # by the thread that writes the recording
            session = self.session
            save = functools.partial(self.saver.save, order.what, player, self.symbolic)
            self._outbox.put(functools.partial(save, session.has_policy, session.agent.spec))

    def _set(self, player: Client, order: Set) -> None:
        view, steps = _program_of(player, order)
        if order.field in ('view', 'steps', 'by_agent') and not self.session.ready(view, steps):
            player.notify(type='notice', text='compiling, a moment …')
            player.wanted = order  # of several changes the last one counts
            self._compiler.want_now(view, steps)
            return
        setattr(player, order.field, order.value)
        player.due = min(player.due, time.monotonic() + 1 / player.pace)
        if order.field == 'view':
            # a recording cannot be played on: real and both need a game
            other = view != 'dream' and player.source != 'game'
            if other:
                player.source = 'game'
            self._want_start(player, None if other else player.start_number())
        elif order.field == 'source':
            if order.value == 'data':
                player.view = 'dream'
            self._want_start(player)

    def _resume(self) -> None:
        """Obey the changes whose programs are compiled by now."""
        for player in self._present():
            order = player.wanted
            if order is not None and self.session.ready(*_program_of(player, order)):
                player.wanted = None
                self._obey(player, order)
                player.notify(type='state', **player.state())

    # ---------------------------------------------------------------- the thread that waits

    def _read(self) -> None:
        try:
            while (job := self._outbox.get()) is not None:
                job()
        except BaseException as error:
            self._fail(error)

    def _show(self, frame: Frame, to: Addressees) -> None:
        """Wait for a frame and put each player's row into its mailbox."""
        host = jax.device_get(frame)
        self._room.release()
        for player, row, header in to:
            if self._plays(player) and player.ended != header['epoch']:
                self.made += 1
                self._shown.append(time.monotonic())
                one = jax.tree.map(lambda x, row=row: x[row], host)
                player.mailbox.put(self._message(player, one, header))

    def _message(self, player: Client, frame: HostFrame, header: dict[str, Any]) -> bytes:
        """Account for a frame of one player and put it into words."""
        t, epoch = header['t'], header['epoch']
        view: View = header['view']
        heads_lag = t > 0 and self.session.heads_lag(view)
        shown = player.recording.take(frame, t, heads_lag)
        if shown.over and view != 'real':
            player.ended = epoch
            self._inbox.put(functools.partial(self._end, player, epoch))
        header |= {'t': shown.t, 'reward': shown.reward, 'score': shown.score, 'over': shown.over}
        header['dropped'] = player.mailbox.dropped
        return frame_message(header, shown.image, frame, self.symbolic)


def _program_of(player: Client, order: Set) -> tuple[View, int]:
    """The view and K that an order leads to."""
    view = order.value if order.field == 'view' else player.view
    steps = order.value if order.field == 'steps' else player.steps
    return view, steps
