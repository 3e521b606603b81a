"""SIGTERM and Ctrl-C as a list that the training loop reads, so that it can save before it ends."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

EXIT = {
    signal.SIGTERM: 75,  # try again later (sysexits), so a scheduler requeues
    signal.SIGINT: 130,
}


@contextlib.contextmanager
def caught_signals() -> Iterator[list[signal.Signals]]:
    """Append SIGTERM and SIGINT to the list instead of ending the process; a second Ctrl-C
    interrupts at once.
    """
    caught: list[signal.Signals] = []

    def handle(number: int, frame: Any) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(signal.Signals(number))

    # Python delivers signals to the main thread only.
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {number: signal.signal(number, handle) for number in EXIT}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
