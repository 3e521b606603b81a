"""The benchmark of interactive play on a shape small enough for a processor."""

import dataclasses

import numpy as np
import pytest

from reverie.commands.bench import fps
from reverie.types import UserError


def test_a_record_says_how_fast_and_of_what(monkeypatch):
    tiny = fps.MODELS['dreamer4-tiny']
    short = lambda t: dataclasses.replace(t, layers=2, time_every=2)
    tiny = tiny._replace(
        dynamics=short(tiny.dynamics), tokenizer=short(tiny.tokenizer), resolution=(32, 32)
    )
    monkeypatch.setitem(fps.MODELS, 'dreamer4-tiny', tiny)
    record = fps.measure('dreamer4-tiny', 'a command', players=2, frames=5, steps=2)
    assert record['fps'] == pytest.approx(2 * record['fps_each']) and record['includes_decode']
    assert record['ms']['min'] <= record['ms']['p50'] <= record['ms']['p95']
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
    assert np.isfinite(record['compile_seconds'])


def test_an_unknown_model_is_refused_by_name():
    with pytest.raises(UserError, match=r'dreamer4-9b.*dreamer4-2b'):
        fps.measure('dreamer4-9b', '')
    with pytest.raises(UserError, match='--players 0'):
        fps.measure('dreamer4-tiny', '', players=0)
