"""The command line: reverie collect | data | train | eval | report | play | bench | doctor.

The options of a command stand beside it in `reverie.commands`. Heavy imports happen inside the
commands, so that --help and a mistyped option answer at once.
"""

import contextlib
import errno
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from reverie.commands import bench, collect, data, doctor, evaluate, play, report, train
from reverie.commands.arguments import parse
from reverie.commands.terminal import say
from reverie.errors import UserError

LONGEST = 2000  # characters of an error
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, a quota or a file takes no more
# A path, an address or permissions that the user can put right.
MISTAKES = (
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
    errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.ENOTEMPTY, errno.EADDRINUSE,
)  # fmt: skip

COMMANDS: dict[str, tuple[type, Callable[..., None]]] = {
    'collect': (collect.Collect, collect.run),
    'data': (data.Data, data.run),
    'train': (train.Train, train.main),  # parses its options itself: they depend on the preset
    'eval': (evaluate.Eval, evaluate.run),
    'report': (report.Report, report.run),
    'play': (play.Play, play.run),
    'bench': (bench.Bench, bench.run),
    'doctor': (doctor.Doctor, doctor.run),
}


def usage() -> str:
    """The commands, a line each."""
    width = max(map(len, COMMANDS))
    lines = ['usage: reverie COMMAND [OPTIONS]; reverie COMMAND --help says more', '']
    for name, (options, _) in COMMANDS.items():
        lines.append(f'  {name:<{width}}  {(options.__doc__ or "").splitlines()[0]}')
    return '\n'.join(lines)


def dispatch(argv: Sequence[str]) -> None:
    """Run the command that `argv` names; raises UserError if it is none."""
    if not argv or argv[0] in ('-h', '--help'):
        say(usage())
        return
    for word in argv:
        if any('\ud800' <= c <= '\udfff' for c in word):  # bytes that were no text
            raise UserError(f'{word!a:.200} is not UTF-8; expected names and values that are')
    name, *rest = argv
    if name not in COMMANDS:
        raise UserError(f'unknown command {name!r}; expected one of {", ".join(COMMANDS)}')
    options, run = COMMANDS[name]
    run(rest if name == 'train' else parse(options, rest, f'reverie {name}'))


@contextlib.contextmanager
def requeued() -> Iterator[None]:
    """End the command on SIGTERM with exit code 75 (sysexits: try again later), so that a scheduler
    requeues it.

    Half-written files are removed and worker processes end. Training saves first, see
    `training.signals`.
    """

    def leave(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one must not interrupt the leaving
        said = 'reverie: SIGTERM: stopped; run the same command to continue'
        print(said, file=sys.stderr, flush=True)
        raise SystemExit(75)

    if threading.current_thread() is not threading.main_thread():  # which alone receives signals
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main() -> None:
    """Entry point.

    A user's mistake is one line on standard error and exit code 2; so are a full disk (74), memory
    that does not suffice (71), SIGTERM (75) and Ctrl-C (130).
    """
    logging.basicConfig(level=logging.WARNING, format='%(levelname)s %(message)s')
    try:
        with requeued():
            dispatch(sys.argv[1:])
    except UserError as error:
        fail(str(error), error.code)
    except BrokenPipeError:
        os._exit(141)
    except KeyboardInterrupt:
        fail('interrupted', 130)
    except OSError as error:
        if error.errno in FULL:
            fail(f'{error}; free space and run the same command', 74)
        fail(' '.join(str(error).split()), 2 if error.errno in MISTAKES else 74)
    except (RuntimeError, MemoryError) as error:
        if 'RESOURCE_EXHAUSTED' not in str(error) and not isinstance(error, MemoryError):
            raise
        fail(f'out of memory: {" ".join(str(error).split())[:200]}', 71)


def fail(said: str, code: int) -> None:
    """Exit with one line on standard error."""
    plain = ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in said)
    shown = plain if len(plain) <= LONGEST else f'{plain[:LONGEST]} ...'
    print(f'error: {shown}', file=sys.stderr)
    raise SystemExit(code)


if __name__ == '__main__':
    from reverie import entry

    entry.main()
