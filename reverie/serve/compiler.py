"""Compiling a session's programs while players go on."""

import collections
import concurrent.futures
import threading
from collections.abc import Callable

from reverie.serve.frame import View
from reverie.serve.session import Session


class ProgramCompiler:
    """Compiles the programs that are wanted, one after another, in a thread of its own.

    on_ready is called after each of them, on_failure with the error of one.
    """

    def __init__(
        self,
        session: Session,
        on_ready: Callable[[], None],
        on_failure: Callable[[BaseException], None],
    ):
        self.session = session
        self.on_ready, self.on_failure = on_ready, on_failure
        self._pool = concurrent.futures.ThreadPoolExecutor(1, 'compile')
        self._lock = threading.Lock()
        self._wanted: collections.deque[tuple[View, int, bool]] = collections.deque()

    def want(self, view: View, steps: int) -> None:
        """Compile the programs of a view and K after all others, a person's first."""
        for plays in (False, True):
            self._want((view, steps, plays), first=False)

    def want_now(self, view: View, steps: int) -> None:
        """Compile the programs of a view and K before all others, a person's first."""
        for plays in (True, False):
            self._want((view, steps, plays), first=True)

    def _want(self, program: tuple[View, int, bool], first: bool) -> None:
        with self._lock:
            if program not in self._wanted:  # each once, however often a page asks
                self._pool.submit(self._compile)
            elif first:
                self._wanted.remove(program)
            else:
                return
            self._wanted.insert(0 if first else len(self._wanted), program)

    def _compile(self) -> None:
        try:
            with self._lock:
                program = self._wanted.popleft()
            self.session.compile(*program)
            self.on_ready()
        except BaseException as error:
            self.on_failure(error)

    def stop(self) -> None:
        """Drop what waits; what is being compiled is left to itself."""
        self._pool.shutdown(wait=False, cancel_futures=True)
