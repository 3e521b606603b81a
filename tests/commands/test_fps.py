"""The benchmark of interactive play on a shape small enough for a processor."""

import dataclasses
import types

import pytest

from reverie.commands.bench import fps
from reverie.types import UserError


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only while a frame is computed or a program compiled, by known seconds."""
    clock = types.SimpleNamespace(now=100.0, compiling=7.0, frames=[])

    class TimedSession(fps.Session):
        def frame(self, *args, **kwargs):
            clock.now += clock.frames.pop(0)
            return super().frame(*args, **kwargs)

        def compile(self, *args, **kwargs):
            clock.now, clock.compiling = clock.now + clock.compiling, 0.0
            return super().compile(*args, **kwargs)

    monkeypatch.setattr(fps, 'Session', TimedSession)
    monkeypatch.setattr(fps, 'time', types.SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_a_record_says_how_fast_and_of_what(monkeypatch, clock):
    tiny = fps.MODELS['dreamer4_tiny']
    change = dataclasses.replace
    short = lambda t: change(t, transformer=change(t.transformer, layers=2, time_every=2))
    config = tiny.config
    config = change(config, dynamics=short(config.dynamics), tokenizer=short(config.tokenizer))
    tiny = fps.Model(config, (32, 32))
    monkeypatch.setitem(fps.MODELS, 'dreamer4_tiny', tiny)
    clock.frames = [0.9, 0.8, 0.7, 0.01, 0.02, 0.03, 0.04, 0.1]  # the first three are not timed
    record = fps.measure('dreamer4_tiny', 'a command', players=2, frames=5, steps=2)
    assert not clock.frames and record['includes_decode']
    assert record['fps_each'] == pytest.approx(5 / 0.2) and record['fps'] == pytest.approx(10 / 0.2)
    assert record['ms'] == pytest.approx({'min': 10.0, 'p50': 30.0, 'p95': 88.0})
    assert record['compile_seconds'] == pytest.approx(7.0)
    assert record['shape'] == {
        'resolution': [32, 32],
        'tokens': 12,
        'context': 16,
        'K': 2,
        'batch': 2,
        'dtype': 'float32',
        'softcap': 50.0,
        'kernel': 'xla',
    }
    d, layers = (
        64,
        2,
        # q, kv, o and the three matrices of SwiGLU; norms, embeddings and the readout are small beside
    )
    inside = layers * (2 * d * 64 + 2 * d * 32 + 3 * d * 4 * d)
    assert inside < record['params']['dynamics'] < 1.25 * inside


def test_an_unknown_model_is_refused_by_name():
    with pytest.raises(UserError, match=r'dreamer4_9b.*dreamer4_paper'):
        fps.measure('dreamer4_9b', '')
    with pytest.raises(UserError, match='--players 0'):
        fps.measure('dreamer4_tiny', '', players=0)
