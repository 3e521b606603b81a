"""The schedule of players: who is due when, and who shares a forward pass."""

from collections.abc import Sequence

from reverie.serve.frame import View
from reverie.serve.players import Client

LONGEST_WAIT_S = 1.0


def until_due(players: Sequence[Client], now: float) -> float:
    """Seconds until some player is due for a frame or a new episode, 1 at most."""
    soonest = LONGEST_WAIT_S
    for player in players:
        if player.wanted_start is not None:
            soonest = min(soonest, player.start_at - now)
        elif not player.paused:
            soonest = min(soonest, (player.over_at or player.due) - now)
        elif player.single and player.over_at is None:
            soonest = 0.0
    return max(0.0, soonest)


def ended(players: Sequence[Client], now: float) -> list[Client]:
    """Players whose pause after the end of an episode is over, and who wait for no start yet."""
    over = [p for p in players if p.over_at is not None and now >= p.over_at and not p.paused]
    return [player for player in over if player.wanted_start is None]


def next_start(players: Sequence[Client], now: float) -> Client | None:
    """The player who has waited longest for a start and may have it now."""
    waiting = [p for p in players if p.wanted_start is not None and p.start_at <= now]
    return min(waiting, key=lambda player: player.start_at, default=None)


def groups(players: Sequence[Client], now: float) -> dict[tuple[View, int], list[Client]]:
    """Players to move now, by view and K, those of one pass.

    A player who is due within half a frame comes along where its view and K have a pass, so that
    players of one pace share every pass from then on.
    """
    found: dict[tuple[View, int], list[Client]] = {}
    for player in players:
        if player.wants_frame(now):
            found.setdefault((player.view, player.steps), []).append(player)
    for player in players:
        group = found.get((player.view, player.steps), [])
        if group and player not in group and player.wants_frame(now + 0.5 / player.pace):
            group.append(player)
    return found
