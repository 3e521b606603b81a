"""Processes of the workers of `envs.host`, and the shared memory they fill in."""

import contextlib
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import tempfile
import time
from typing import IO

from reverie.envs import worker

START_S = 120.0  # time to import packages and build an environment, whatever timeout_s is
LEAVE_S = 2.0  # time to close an environment before its process is killed
ONE_THREAD = ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS')


class WorkerError(Exception):
    """Failure of a worker that died, hung or raised; says how."""


class WorkerRefusedError(WorkerError):
    """Request for an environment that cannot be met; says what was given and what was expected."""


class Process:
    """Process of one copy; `due` is the time by which it must answer, `ready` is set once it has
    sent its layout.
    """

    def __init__(self, setup: bytes, memory: int):
        self.log = tempfile.TemporaryFile()  # noqa: SIM115, closed with the process
        self.pipe, theirs = multiprocessing.connection.Pipe()
        # The reader's own modules may stand in the current folder, which a console script leaves out.
        path = os.pathsep.join(dict.fromkeys([*(p or os.getcwd() for p in sys.path), os.getcwd()]))
        env = os.environ | {'PYTHONPATH': path, 'JAX_PLATFORMS': 'cpu'}
        env |= {name: os.environ.get(name, '1') for name in ONE_THREAD}
        arguments = map(str, (theirs.fileno(), memory, os.getpid()))
        command = [sys.executable, '-P', '-m', worker.__name__, *arguments]
        # A session of its own: Ctrl-C reaches us alone, and a kill reaches the processes that the
        # environment itself has started.
        self.process = subprocess.Popen(
            command, env=env, pass_fds=(theirs.fileno(), memory), start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log,
        )  # fmt: skip
        theirs.close()
        self.due, self.ready = time.monotonic() + START_S, False
        self.send(setup)

    def send(self, order: bytes) -> None:
        with contextlib.suppress(OSError):  # a dead worker is noticed when it should answer
            self.pipe.send_bytes(order)

    def recv(self) -> bytes:
        """Receive an answer. Raises WorkerError if the process is gone or its environment raised."""
        try:
            reply = self.pipe.recv_bytes()
        except (EOFError, OSError):
            raise WorkerError(self.exit_message()) from None
        if reply[:1] == b'?':
            raise WorkerRefusedError(reply[1:].decode())
        if reply[:1] == b'!':
            raise WorkerError(reply[1:].decode())
        return reply

    def exit_message(self) -> str:
        """End the process and say how it ended, with the last line it printed."""
        self.end(1.0)  # the pipe closes a moment before the exit code is known
        code, size = self.process.returncode or 0, os.fstat(self.log.fileno()).st_size
        signalled = f'was ended by {signal.Signals(-code).name}' if code < 0 else ''
        printed = os.pread(self.log.fileno(), 2000, max(0, size - 2000)).decode(errors='replace')
        said = [line.strip() for line in printed.split('\n') if line.strip(' \0')]
        how = signalled or f'exited with code {code}'
        return f'its process {how}' + (f', saying last: {said[-1][:200]}' if said else '')

    def end(self, grace: float) -> None:
        """End the process, after `grace` seconds by force, and reap it."""
        self.pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(grace)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        # a process that is stuck in the kernel will never run our code again
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(LEAVE_S)

    def close(self, grace: float) -> None:
        self.end(grace)
        self.log.close()


def stop_all(processes: list[Process], memory: IO[bytes], owner: int) -> None:
    """Close all processes and their shared memory, in the process `owner` alone."""
    if os.getpid() != owner:  # a fork of the process that owns them
        return
    end = time.monotonic() + LEAVE_S
    for process in processes:
        process.pipe.close()  # all may leave at the same time
    for process in processes:
        process.close(max(0.0, end - time.monotonic()))
    processes.clear()
    memory.close()


def memory_file() -> IO[bytes]:
    """Open shared memory without a name, so that nothing is left behind however we end."""
    if hasattr(os, 'memfd_create'):
        return os.fdopen(os.memfd_create('reverie'), 'r+b')
    return tempfile.TemporaryFile()
