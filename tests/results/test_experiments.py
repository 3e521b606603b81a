"""The declared experiments are commands that exist and leave the files they are named after."""

import importlib.util
import pathlib
import shlex
import sys

import pytest

from reverie import cli
from reverie.commands.arguments import parse
from reverie.commands.collect import Collect
from reverie.commands.train import parse_train

ROOT = pathlib.Path(__file__).parents[2]


def declared():
    spec = importlib.util.spec_from_file_location(
        'results_experiments', ROOT / 'results' / 'experiments.py'
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module.EXPERIMENTS


EXPERIMENTS = declared()


def test_names_and_clones_are_unique():
    for names in ([e.name for e in EXPERIMENTS], [e.name.replace('/', '-') for e in EXPERIMENTS]):
        assert len(set(names)) == len(names)


@pytest.mark.parametrize('experiment', EXPERIMENTS, ids=lambda e: e.name)
def test_commands_are_understood_and_the_last_one_writes_the_results(experiment):
    for command in experiment.commands:
        program, *args = shlex.split(command)
        if program == 'python':
            assert (ROOT / args[0]).exists()
            continue
        assert program == 'reverie'
        if args[0] == 'train':
            parsed = parse_train(*args[1:])
            written = [str(path) for path in (parsed.results, *parsed.add_to) if path]
            last = shlex.split(experiment.commands[-1])
            by_script = [last[last.index('--results') + 1]] if last[0] == 'python' else written
            assert parsed.seeds == experiment.seeds and by_script == [experiment.results]
        else:
            parsed = parse(cli.COMMANDS[args[0]][0], args[1:], 'reverie')
            assert args[0] != 'bench' or str(parsed.out) == experiment.results
    assert experiment.device in ('cpu', 'gpu') and experiment.minutes > 0 and experiment.proves


def test_data_is_collected_where_training_looks_for_it():
    several = [e.commands for e in EXPERIMENTS if e.commands[0].startswith('reverie collect')]
    assert several
    for collect, train in ((first, other) for first, *rest in several for other in rest):
        made = parse(Collect, shlex.split(collect)[2:], 'reverie')
        words = shlex.split(train)
        if words[0] == 'python' and '--data' not in words:
            continue  # it takes a run
        assert made.overwrite and words[words.index('--data') + 1] == str(made.out)
        if words[0] == 'reverie':
            assert parse_train(*words[2:]).env == made.env
