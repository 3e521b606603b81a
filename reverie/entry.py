"""Entry point of the console script: what must hold from the first moment to the last.

Ctrl-C while modules are imported ends at once, without a traceback; after one that was obeyed, as
after SIGTERM, threads that still compile are not waited for.
"""

import os
import signal
import sys
import threading
from types import FrameType

INTERRUPTED, REQUEUED = 130, 75
IMPORTING = '<frozen importlib._bootstrap>'
COLLECTING = '_xla_gc_callback'  # of JAX, while Python collects garbage


def main() -> None:
    """Run the command line; the process ends here."""
    signal.signal(signal.SIGINT, interrupt)
    try:
        from reverie import cli

        cli.main()
    except SystemExit as stop:
        if stop.code in (INTERRUPTED, REQUEUED):
            leave(int(stop.code))
        raise


def interrupt(number: int, frame: FrameType | None) -> None:
    """Handler of Ctrl-C: KeyboardInterrupt, but while a module is being imported the end."""
    at = frame
    while at is not None:
        if at.f_code.co_filename == IMPORTING:
            print('error: interrupted', file=sys.stderr, flush=True)
            os._exit(INTERRUPTED)
        if at.f_code.co_name == COLLECTING:  # its callers swallow exceptions
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
            return
        at = at.f_back
    raise KeyboardInterrupt


def leave(code: int) -> None:
    """End the process; another Ctrl-C changes nothing any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # nobody reads it any more
            continue
    os._exit(code)


if __name__ == '__main__':
    main()
