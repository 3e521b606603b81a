"""Sinks: files that stay valid, a terminal that degrades to lines, optional back-ends."""

import io
import json
import struct
import sys

import pytest
from toy_agent import toy

from reverie.training import metrics
from reverie.types import UserError


def record(step=10, gradient_steps=None, phase='model', **values):
    gradient_steps = step if gradient_steps is None else gradient_steps
    base = dict(
        phase=phase, step=step, gradient_steps=gradient_steps, env_frames=8 * step, seconds=1.5
    )
    return {
        **base,
        'loss/fit': 0.25,
        'time/updates_per_s': 2.0,
        'time/frames_per_s': 16.0,
        **values,
    }


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
    assert '1/2 model  10/20' in terminal.line(
        record(10)
    ) and 'left 5 s, in all ~10 s' in terminal.line(record(10))


def test_without_a_terminal_lines_come_every_few_seconds_and_at_phase_ends():
    file = io.StringIO()
    terminal = metrics.Terminal(toy((20, 10)).phases, every_s=1e9, file=file)
    for step in (1, 2, 3, 20):
        terminal.write(record(step))
    terminal.write(record(1, 21, phase='head'))
    terminal.close()
    lines = file.getvalue().splitlines()
    assert [line.split()[1:3] for line in lines] == [
        ['model', '1/20'],
        ['model', '20/20'],
        ['head', '1/10'],
    ]
    assert '\x1b' not in file.getvalue()


def test_a_record_without_a_speed_yet_says_so():
    first = {k: v for k, v in record(4).items() if not k.startswith('time/')}
    line = metrics.Terminal(toy().phases, file=io.StringIO()).line(first)
    assert 'left –' in line and '0 frames/s' not in line


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


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """W&B as on a machine where nobody has ever logged in, with no network."""
    import wandb

    for name in ('HOME', 'WANDB_CONFIG_DIR', 'WANDB_CACHE_DIR', 'WANDB_DATA_DIR'):
        monkeypatch.setenv(name, str(tmp_path / 'home'))
    monkeypatch.delenv('WANDB_API_KEY', raising=False)
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setattr(sys, 'stdin', None)  # whoever asks something fails
    wandb.teardown()
    yield wandb
    wandb.teardown()


def logged(path):
    """{step: metrics} of a file that W&B keeps until it is synchronised: LevelDB's log format, 7
    bytes of header.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, part, found = path.read_bytes(), 7, b'', {}
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # a block's end has no room for another header
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack('<IHB', data[at : at + 7])
        part, at = part + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last piece
            entry, part = Record.FromString(part), b''
            if entry.WhichOneof('record_type') == 'history':
                items = {
                    i.key or '/'.join(i.nested_key): json.loads(i.value_json)
                    for i in entry.history.item
                }
                found[items['_step']] = items
    return found


@pytest.mark.external('wandb', 'wandb')
def test_wandb_offline_holds_every_scalar_and_a_continued_run_keeps_its_id(offline, tmp_path):
    for steps in ((4, 8), (8, 12)):
        sink = metrics.WandB(tmp_path / 'run', 'dreams', 'run', dict(a=1))
        assert not (tmp_path / 'run' / 'wandb').exists() or steps == (
            8,
            12,
        )  # a refused folder leaves nothing
        (tmp_path / 'run').mkdir(exist_ok=True)
        for step in steps:
            sink.write(record(step, **{'loss/size': float('nan'), 'loss/fit/seeds': [0.2, 0.3]}))
        sink.close()
    files = sorted((tmp_path / 'run' / 'wandb').glob('offline-run-*/*.wandb'))
    assert len({file.stem for file in files}) == 1
    found = {step: items for file in files for step, items in logged(file).items()}
    assert sorted(found) == [4, 8, 12]
    assert all(
        x['loss/fit'] == 0.25 and x['env_frames'] == 8 * s and x['seconds'] == 1.5
        for s, x in found.items()
    )
    assert not any('loss/size' in x or 'loss/fit/seeds' in x for x in found.values())


@pytest.mark.external('wandb', 'wandb')
def test_wandb_without_a_key_is_a_users_mistake_at_once(offline, monkeypatch, tmp_path):
    monkeypatch.setenv('WANDB_MODE', 'online')
    offline.teardown()
    with pytest.raises(UserError, match=r'Weights & Biases: .*set WANDB_MODE=offline'):
        metrics.WandB(tmp_path, 'dreams')


@pytest.mark.parametrize(
    'module, sink, extra',
    [
        ('tensorboardX', lambda path: metrics.TensorBoard(path), 'tensorboard'),
        ('wandb', lambda path: metrics.WandB(path, 'p'), 'wandb'),
    ],
)
def test_a_missing_back_end_names_the_command_that_installs_it(
    monkeypatch, tmp_path, module, sink, extra
):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"pip install 'reverie\[{extra}\]'"):
        sink(tmp_path)


@pytest.mark.parametrize(
    'seconds, text', [(8, '8 s'), (200, '3 min'), (3720, '1 h 2 min'), (float('inf'), '–')]
)
def test_durations_are_short(seconds, text):
    assert metrics.duration(seconds) == text


DAMAGES = {
    'torn': lambda lines: [*lines, lines[0][:30]],
    'not utf-8': lambda lines: [*lines, b'\xff\xfe{"phase": "model"}'],
    'blank': lambda lines: [b'', lines[0], b'  \t', *lines[1:]],
    'nuls': lambda lines: [b'\x00' * 4096, *lines],
    'a list': lambda lines: [b'[1, 2]', *lines, b'7', b'null'],
    'no step': lambda lines: [b'{"phase": "model", "gradient_steps": 1}', *lines],
    'words for numbers': lambda lines: [lines[0].replace(b'1.5', b'"soon"'), *lines],
    'not a number': lambda lines: [lines[0].replace(b'1.5', b'NaN'), *lines],
    'deep': lambda lines: [b'[' * 100_000, *lines],
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_damaged_lines_are_left_out_and_said_once(tmp_path, capfd, damage):
    sink = metrics.Jsonl(tmp_path / 'm.jsonl')
    for step in (1, 2, 3):
        sink.write(record(step))
    lines = sink.path.read_bytes().splitlines()
    sink.path.write_bytes(b'\n'.join(DAMAGES[damage](lines)) + b'\n')
    assert [r['step'] for r in metrics.read(sink.path)] == [1, 2, 3]
    assert capfd.readouterr().err.count('left out') == (damage != 'blank')
    sink.drop_after(2)
    sink.write(record(3))
    assert [r['step'] for r in metrics.read(sink.path)] == [1, 2, 3]
    assert capfd.readouterr().err.count('left out') == (damage != 'blank')


@pytest.mark.parametrize('kind', ['missing', 'a folder', 'unreadable'])
def test_a_log_that_is_none_stops_nothing(tmp_path, capfd, kind):
    path = tmp_path / 'm.jsonl'
    if kind == 'a folder':
        path.mkdir()
    elif kind == 'unreadable':
        path.symlink_to(path)
    sink = metrics.Jsonl(path)
    sink.drop_after(1)
    sink.write(record(1))
    assert [r['step'] for r in metrics.read(path)] == ([1] if kind == 'missing' else [])
    assert (str(path) in capfd.readouterr().err) == (kind != 'missing')
