"""Manifests and checkpoints that were signed again with absurd contents: one line, or as if they
were true; never another exception.
"""

import copy
import json
import shutil

import numpy as np
import pytest

from reverie.data import Episodes, inspect, verify
from reverie.data.fields import misfit
from reverie.data.manifest import checksum
from reverie.io import file_hash
from reverie.training import checkpoint
from reverie.types import UserError

ABSURD = (None, -1, 10**30, 1.5, '\x1b[31m<script>', [], {}, True, 'a' * 10_000)


def places(node, path=()):
    """Paths of all values in nested mappings and lists, of lists the first two."""
    yield path
    items = node.items() if isinstance(node, dict) else ()
    if isinstance(node, list):
        items = list(enumerate(node))[:2]
    for key, inner in items:
        yield from places(inner, (*path, key))


def replaced(node, path, value):
    if not path:
        return value
    changed = copy.deepcopy(node)
    at = changed
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return changed


def outcome(function):
    """None if it returns, else the one line it raises as UserError."""
    try:
        function()
    except UserError as error:
        line = str(error)
        assert '\n' not in line and line.isprintable() and len(line) < 2000, line
        return line
    return None


def test_a_manifest_with_any_absurd_value_is_refused_in_one_line_or_taken(tmp_path, world):
    rng = np.random.default_rng(0)
    path = world.write(tmp_path / 'd', [world.episode(0, 3, rng), world.episode(1, 4, rng)])
    file = path / 'manifest.json'
    manifest = json.loads(file.read_text())
    refused = 0
    for place in places(manifest):
        for value in ABSURD:
            absurd = replaced(manifest, place, value)
            if isinstance(absurd, dict):
                absurd['checksum'] = checksum(absurd)
            file.write_text(json.dumps(absurd))
            opened, seen, sound = (
                outcome(lambda: Episodes(path).returns()), outcome(lambda: inspect(path)),
                outcome(lambda: verify(path)),
            )  # fmt: skip
            assert sound or not (opened or seen), f'{place} = {value!r:.20} passes verify'
            refused += sound is not None
    assert refused > 300


def test_a_checkpoint_with_any_absurd_entry_is_refused_in_one_line_or_taken(tmp_path):
    params = {'w': np.ones((1, 2, 3), np.float32)}
    meta = dict(
        phase='a', phase_index=0, step=3, complete=True, gradient_steps=3, env_frames=9, seconds=1.5,
        seeds=1, config={'phases': {'a': {'steps': 3}}}, source={'source': 'x'},
    )  # fmt: skip
    step = checkpoint.save(tmp_path / 'checkpoints', 3, params, None, meta)
    written, signed = (json.loads((step / f).read_text()) for f in ('meta.json', 'manifest.json'))
    kept = shutil.copytree(step, tmp_path / 'kept')
    for place in places(written):
        for value in ABSURD:
            shutil.rmtree(tmp_path / 'checkpoints')
            shutil.copytree(kept, step)
            (step / 'meta.json').write_text(json.dumps(replaced(written, place, value)))
            signed['meta.json'] = file_hash(step / 'meta.json')
            (step / 'manifest.json').write_text(json.dumps(signed))
            outcome(lambda: checkpoint.load(tmp_path))
            if place == ('phase_index',) and value != 10**30:
                with pytest.raises(UserError, match='phase_index'):
                    checkpoint.load(tmp_path)


@pytest.mark.parametrize('value, kind, says', [
    ({'a': 1}, {'a': int, 'b?': str}, None), ({'a': 1, 'b': 2}, {'a': int, 'b?': str}, 'b is 2, expected a short text'),
    ({}, {'a': int}, 'a is missing'), ({'x': {'n': -1}}, {str: {'n': int}}, 'n is -1, expected a whole number'),
    ([1, 'x'], [int], r"\[1\] is 'x'"), (None, float | None, None), (float('nan'), float | None, 'a finite number'),
    ('a\nb', str, r"'a\\nb', expected a short text"), (True, int, 'a number'), (1, bool, 'true or false'),
])  # fmt: skip
def test_fields_are_compared_with_their_declared_types(value, kind, says):
    import re

    found = misfit(value, kind, '')
    assert (found is None) if says is None else re.search(says, found)
