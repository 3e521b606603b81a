"""Sinks: files that stay valid, a terminal that degrades to lines, optional back-ends."""

import io
import json
import sys

import pytest
from toy_agent import toy

from reverie.training import metrics
from reverie.types import UserError


def record(step=10, gradient_steps=None, phase='model', **values):
    gradient_steps = step if gradient_steps is None else gradient_steps
    base = dict(phase=phase, step=step, gradient_steps=gradient_steps, env_frames=8 * step, seconds=1.5)
    return {**base, 'loss/fit': 0.25, 'time/updates_per_s': 2.0, 'time/frames_per_s': 16.0, **values}


def test_jsonl_lines_are_strict_json_even_for_nan(tmp_path):
    sink = metrics.Jsonl(tmp_path / 'm.jsonl')
    sink.write(record(a=float('nan'), b=[1.0, float('inf')]))
    (line,) = (tmp_path / 'm.jsonl').read_text().splitlines()
    value = json.loads(line, parse_constant=lambda name: pytest.fail(name))
    assert value['a'] is None and value['b'] == [1.0, None] and value['loss/fit'] == 0.25


def test_resuming_drops_later_lines_and_a_torn_one(tmp_path):
    sink = metrics.Jsonl(tmp_path / 'm.jsonl')
    for step in (1, 2, 3):
        sink.write(record(step))
    with open(sink.path, 'a') as f:
        f.write('{"gradient_steps": 1, "lo')
    sink.drop_after(2)
    assert [r['gradient_steps'] for r in metrics.read(sink.path)] == [1, 2]


def test_a_disk_that_takes_no_metrics_warns_once_and_goes_on(tmp_path, capfd):
    sink = metrics.Jsonl(tmp_path / 'absent' / 'm.jsonl')
    sink.write(record(1))
    sink.write(record(2))
    assert capfd.readouterr().err.count('CANNOT WRITE METRICS') == 1


def test_the_terminal_knows_the_time_left():
    terminal = metrics.Terminal(toy((20, 10)).phases, file=io.StringIO())
    # 10 of 20 updates left at 2 per second, then 10 updates of equal batches
    assert terminal.left(record(10)) == (5.0, 10.0)
    assert '1/2 model  10/20' in terminal.line(record(10)) and 'left 5s, in all ~10s' in terminal.line(record(10))


def test_without_a_terminal_lines_come_every_few_seconds_and_at_phase_ends():
    file = io.StringIO()
    terminal = metrics.Terminal(toy((20, 10)).phases, every_s=1e9, file=file)
    for step in (1, 2, 3, 20):
        terminal.write(record(step))
    terminal.write(record(1, 21, phase='head'))
    terminal.close()
    lines = file.getvalue().splitlines()
    assert [line.split()[1:3] for line in lines] == [['model', '1/20'], ['model', '20/20'], ['head', '1/10']]
    assert '\x1b' not in file.getvalue()


def test_a_record_without_a_speed_yet_says_so():
    first = {k: v for k, v in record(4).items() if not k.startswith('time/')}
    line = metrics.Terminal(toy().phases, file=io.StringIO()).line(first)
    assert 'left ?' in line and '0 frames/s' not in line


def test_the_live_display_shows_each_phase(monkeypatch):
    monkeypatch.setenv('TERM', 'xterm')
    file = io.StringIO()
    terminal = metrics.Terminal(toy((20, 10)).phases, file=file, live=True)
    terminal.write(record(10))
    terminal.write(record(5, 25, phase='head'))
    terminal.close()
    assert '1/2 model' in file.getvalue() and '2/2 head' in file.getvalue()


def test_tensorboard_holds_every_scalar(tmp_path):
    pytest.importorskip('tensorboardX')
    sink = metrics.TensorBoard(tmp_path)
    sink.write(record(10, **{'loss/fit/seeds': [0.2, 0.3]}))
    sink.close()
    (file,) = tmp_path.glob('events*')
    assert b'loss/fit' in file.read_bytes() and b'loss/fit/seeds' not in file.read_bytes()


@pytest.mark.parametrize(
    'module, sink, extra',
    [
        ('tensorboardX', lambda path: metrics.TensorBoard(path), 'tensorboard'),
        ('wandb', lambda path: metrics.WandB(path, 'p'), 'wandb'),
    ],
)
def test_a_missing_back_end_names_the_command_that_installs_it(monkeypatch, tmp_path, module, sink, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"pip install 'reverie\[{extra}\]'"):
        sink(tmp_path)


@pytest.mark.parametrize('seconds, text', [(8, '8s'), (200, '3m20'), (3720, '1h02'), (float('inf'), '?')])
def test_durations_are_short(seconds, text):
    assert metrics.duration(seconds) == text
