"""Guard of the server: Host, Origin and token of a request, rates, and what is logged of clients."""

import collections
import dataclasses
import hmac
import ipaddress
import logging
import secrets
import time
from collections.abc import Mapping

LOOPBACK = ('127.0.0.1', 'localhost', '::1')


def new_token() -> str:
    return secrets.token_urlsafe(18)


def split_host(header: str) -> tuple[str, int | None] | None:
    """'localhost:8000' or '[::1]:8000' -> (name, port or None); None if it is neither."""
    name, port = header, None
    if header.startswith('['):
        name, bracket, rest = header[1:].partition(']')
        if not bracket or (rest and not rest.startswith(':')):
            return None
        port = rest[1:] or None
    elif header.count(':') == 1:
        name, _, port = header.partition(':')
    elif ':' in header:
        return None
    if not name or (port is not None and not (port.isascii() and port.isdigit() and len(port) < 6)):
        return None
    return name.lower(), None if port is None else int(port)


def is_address(name: str) -> bool:
    """Whether a name is a literal IP address, which no name server can rebind."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


@dataclasses.dataclass(frozen=True)
class Guard:
    """Checks of requests before any route sees them."""

    host: str  # where the server listens
    port: int
    token: str  # part of the URL
    names: tuple[str, ...] = ()  # further host names to answer to

    def knows(self, header: str) -> bool:
        """Whether a Host header, or the part of an Origin behind //, means this server."""
        found = split_host(header)
        if found is None:
            return False
        name, port = found
        if name in self.names:  # behind a proxy, which has a port of its own
            return True
        if port != self.port:
            return False
        return name in (*LOOPBACK, self.host) or (self.host not in LOOPBACK and is_address(name))

    def refusal(self, headers: Mapping[str, str], token: str | None) -> str | None:
        """Why a request is refused, or None.

        A page of another site gives itself away by Origin or Host.
        """
        if not self.knows(headers.get('host', '')):
            return 'unknown host'
        origin = headers.get('origin')
        if origin is not None:
            scheme, _, rest = origin.partition('://')
            if scheme not in ('http', 'https') or not self.knows(rest):
                return 'wrong origin'
        if token is None or not hmac.compare_digest(token.encode(), self.token.encode()):
            return 'wrong token; use the address that reverie play printed'
        return None


class Bucket:
    """Token bucket: lets `rate` tokens per second pass in the long run, `burst` at once."""

    def __init__(self, rate: float, burst: float):
        self.rate, self.burst = rate, burst
        self.left, self.then = float(burst), time.monotonic()
        self._empty_since: float | None = None

    def wait(self, count: int = 1) -> float:
        """Take `count` tokens and return 0; if there are too few, seconds until there are enough."""
        now = time.monotonic()
        self.left = min(self.burst, self.left + (now - self.then) * self.rate)
        self.then = now
        if self.left > self.burst / 2:
            self._empty_since = None
        if self.left + 1e-6 >= min(count, self.burst):
            self.left -= count
            return 0.0
        if self._empty_since is None:
            self._empty_since = now
        return (min(count, self.burst) - self.left) / self.rate

    def reserve(self) -> float:
        """Take a token that may be still to come, one at most; return seconds until it is there."""
        self.wait(0)
        self.left = max(self.left - 1, -1.0)
        return max(0.0, -self.left / self.rate)

    def held_back(self) -> float:
        """Seconds since tokens began to lack, without a pause in which half of them came back."""
        return 0.0 if self._empty_since is None else time.monotonic() - self._empty_since


class FirstOfEach(logging.Filter):
    """Passes the first few records of each message, so that no client can fill a log."""

    def __init__(self, most: int = 5):
        super().__init__()
        self.most = most
        self._seen: collections.Counter[tuple[str, int, str]] = collections.Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        where = record.pathname, record.lineno, record.levelname
        self._seen[where] += 1
        if self._seen[where] == self.most:
            record.msg, record.args = f'{record.getMessage()} (no more lines of this kind)', None
        return self._seen[where] <= self.most
