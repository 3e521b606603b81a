"""Players without threads: who is due, who shares a pass, and whose reward comes late."""

import asyncio

import numpy as np
import pytest

from reverie.serve import schedule
from reverie.serve.frame import Frame
from reverie.serve.mailbox import Mailbox, Orders
from reverie.serve.messages import Act, Do, Set
from reverie.serve.players import Client, Recording

MAILBOX = Mailbox(asyncio.new_event_loop())


def player(slot, due=0.0, **options):
    made = Client(slot, MAILBOX, (1.0, 0.0), pace=10.0, steps=4, due=due, epoch=1)
    for name, value in options.items():
        setattr(made, name, value)
    return made


def slots(groups):
    return {key: [p.slot for p in group] for key, group in groups.items()}


def test_players_of_one_view_and_k_share_a_pass_and_who_is_due_soon_comes_along():
    players = [
        player(0, due=1.0),
        player(1, due=1.04),
        player(2, due=1.06),
        player(3, due=1.0, view='real'),
        player(4, due=1.0, steps=2),
        player(5, due=9.0, paused=True, single=1),
    ]
    expected = {('dream', 4): [0, 5, 1], ('real', 4): [3], ('dream', 2): [4]}
    assert slots(schedule.groups(players, 1.0)) == expected
    assert slots(schedule.groups(players[1:3], 1.0)) == {}  # nobody is due, nobody comes along


def test_players_of_equal_pace_fall_into_step():
    """Two players begun a third of a frame apart share each pass from the first on."""
    players, shared = [player(0, due=0.0), player(1, due=0.03)], 0
    now = 0.0
    for _ in range(20):
        now += schedule.until_due(players, now)
        for group in schedule.groups(players, now).values():
            shared += len(group) == 2
            for each in group:
                each.count_frame(now)
    assert shared == 20


@pytest.mark.parametrize(
    'options, wait, restarts',
    [
        (dict(due=1.5), 0.5, False),
        (dict(due=0.2), 0.0, False),
        (dict(due=0.2, paused=True), 1.0, False),
        (dict(due=0.2, paused=True, single=2), 0.0, False),
        (dict(due=0.2, over_at=1.3), 0.3, False),
        (dict(due=0.2, over_at=0.9), 0.0, True),
        (dict(due=0.2, over_at=0.9, paused=True), 1.0, False),
        (dict(due=0.2, over_at=0.9, paused=True, single=1), 1.0, False),
        (dict(due=0.2, wanted_start=3, start_at=1.4), 0.4, False),
        (dict(due=0.2, wanted_start=3, start_at=0.4, paused=True), 0.0, False),
    ],
)
def test_the_wait_is_until_a_frame_or_a_new_episode_is_due(options, wait, restarts):
    players = [player(0, **options)]
    assert schedule.until_due(players, 1.0) == pytest.approx(wait)
    assert bool(schedule.ended(players, 1.0)) == restarts


def test_starts_come_one_by_one_and_nobody_moves_before_his():
    players = [
        player(i, due=0.5, wanted_start=i, start_at=at) for i, at in enumerate((0.9, 0.8, 3))
    ]
    assert schedule.groups(players, 1.0) == {}
    begun = []
    while (found := schedule.next_start(players, 1.0)) is not None:
        begun.append(found.slot)
        found.begin(found.wanted_start)
    assert begun == [1, 0]


def order(*values):
    """An action, or what a page does or sets."""
    if isinstance(values[0], int):
        return Act((1.0, 0.0), values[0])
    return Do(*values) if len(values) == 1 else Set(*values)


def test_a_flood_is_as_few_orders_as_it_has_different_ones_and_the_last_one_counts():
    orders = Orders()
    assert orders.put(order('pace', 1.0)) and not orders.put(order(0))
    for i in range(1000):
        for each in (
            order(i),
            order('reset'),
            order('pace', float(i)),
            order('step'),
            order('gif'),
        ):
            assert not orders.put(each)
    found = orders.take()
    assert [o.id for o in found if isinstance(o, Act)] == [996, 997, 998, 999]
    assert [o for o in found if isinstance(o, Set)] == [order('pace', 999.0)]
    does = [o.what for o in found if isinstance(o, Do)]
    assert sorted(does) == ['gif', 'reset', 'step', 'step', 'step', 'step']
    assert not orders.take() and orders.put(order('reset'))


def test_orders_that_differ_are_obeyed_in_the_order_they_came():
    orders = Orders()
    came = [order('step'), order('paused', False), order(1), order('view', 'real'), order('reset')]
    for each in came:
        orders.put(each)
    assert orders.take() == came


def frame(number, reward, is_last=False):
    image = np.full((2, 2, 3), number, np.uint8)
    cont = 0.1 if is_last else 0.9
    return Frame(image, None, None, np.zeros(2), reward, cont, is_last, 0.0, None)


def test_a_late_reward_goes_to_the_frame_before_and_the_last_frame_stays_on_the_screen():
    """A start, then pipelined frames whose heads speak of the one before; both accounts agree."""
    pipelined, synchronous = Recording(), Recording()
    pipelined.take(frame(0, 0.0), 0, False)
    late = [(1, 0.0), (2, 0.5), (3, 2.0)]
    shown = [pipelined.take(frame(t, said), t, True) for t, said in late]
    shown.append(pipelined.take(frame(4, 1.0, is_last=True), 4, True))
    for t, reward in enumerate((0.0, 0.5, 2.0, 1.0)):
        last = synchronous.take(frame(t, reward, is_last=t == 3), t, False)
    assert [x.reward for x in shown] == [None, 0.5, 2.0, 1.0]
    assert [x.t for x in shown] == [1, 2, 3, 3] and shown[-1].image[0, 0, 0] == 3
    assert shown[-1].over and last.over and shown[-1].score == last.score == 3.5
    for a, b in zip(pipelined.frames, synchronous.frames, strict=True):
        np.testing.assert_array_equal(a.image, b.image)
        assert (a.reward, a.is_first, a.is_last) == (b.reward, b.is_first, b.is_last)
        assert a.is_terminal == b.is_terminal


def test_keys_of_several_parts_pressed_together_count_from_one_frame_and_no_press_is_lost():
    """Entries: walk, turn, fire."""
    one = player(0)
    one.held = (0.0, 0.0, 0.0)
    orders = [(1, 0, 0), (1, 1, 0), (1, 1, 1), (1, 1, 0), (0, 1, 0), (0, 1, 1)]
    for number, action in enumerate(orders, 1):
        one.act(tuple(map(float, action)), number)
    taken = [(one.next_action(), one.id) for _ in range(4)]
    # The shot begins, ends while the walk does, and begins again.
    assert taken == [((1, 1, 1), 3), ((0, 1, 0), 5), ((0, 1, 1), 6), ((0, 1, 1), 6)]
