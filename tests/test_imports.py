"""Who may import whom: the rule of docs/INTERNALS.md."""

import ast
import pathlib
import re

import pytest

import reverie

ROOT = pathlib.Path(reverie.__file__).parent
EVERYTHING = {
    'nn', 'models', 'objectives', 'agents', 'data', 'envs', 'training', 'evaluation', 'report',
    'commands', 'serve', 'cli',
}  # fmt: skip
FREE = {'types', 'actions', 'errors', 'io', 'text', 'imports', '__version__'}  # for everybody
ALLOWED = {
    'errors': set(),
    'text': set(),
    'io': set(),
    'imports': set(),
    'types': set(),
    'actions': set(),
    'nn': set(),
    'models': {'nn'},
    'objectives': {'nn.dists', 'nn.scan'},
    'agents': {'nn', 'models', 'objectives', 'envs.device'},
    'data': set(),
    'envs': set(),
    'training': {'data', 'envs'},
    'evaluation': {'envs', 'data', 'objectives.behavior'},
    'report': {'evaluation', 'data', 'envs', 'training.legacy', 'training.metrics'},
    'commands': EVERYTHING - {'cli'},
    'serve': {'data', 'envs', 'evaluation'},
    'cli': EVERYTHING | {'entry'},
    'entry': {'cli'},
    'api': EVERYTHING - {'cli'},
}


def imported(tree: ast.AST) -> set[str]:
    """Dotted names inside reverie that a module imports, anywhere in it."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f'{node.module}.{alias.name}' for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {n.removeprefix('reverie.') for n in names if n.startswith('reverie.')}


def breaches(package: str, names: set[str]) -> set[str]:
    allowed = ALLOWED[package] | FREE | {package}
    return {n for n in names if not any(n == a or n.startswith(f'{a}.') for a in allowed)}


@pytest.mark.parametrize('path', sorted(ROOT.rglob('*.py')), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_imports_only_what_its_package_may(path):
    package = path.relative_to(ROOT).with_suffix('').parts[0]
    if package == '__init__':
        return
    assert not breaches(package, imported(ast.parse(path.read_text())))


UNSAFE = {'pickle', 'dill', 'joblib', 'shelve', 'marshal', 'torch', 'cloudpickle'}


def executes(tree: ast.AST) -> list[str]:
    """Names in a module that could run code from a file: pickles by any name, `eval`, `exec`."""
    found = []
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ''] if isinstance(node, ast.ImportFrom) else []
        found += [name for name in names if name.split('.')[0] in UNSAFE]
        if isinstance(node, ast.keyword) and node.arg in ('allow_pickle', 'weights_only'):
            safe = node.arg == 'weights_only'
            found += (
                [node.arg]
                if not (isinstance(node.value, ast.Constant) and node.value.value is safe)
                else []
            )
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ('eval', 'exec')
        ):
            found.append(node.func.id)
    return found


@pytest.mark.parametrize('path', sorted(ROOT.rglob('*.py')), ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_that_is_read_can_run_code(path):
    safe = {
        'envs/arguments.py': ['cloudpickle'],  # to its own worker processes; none of it is a file
        # One published file of weights, by its SHA-256 and without any name but NumPy's arrays.
        'nn/lpips.py': ['pickle'],
    }
    expected = safe.get(path.relative_to(ROOT).as_posix(), [])
    assert executes(ast.parse(path.read_text())) == expected


def test_the_rule_notices_a_pickle():
    tree = ast.parse(
        'import pickle\nload(f, allow_pickle=True)\nload(f, allow_pickle=False)\nexec(x)'
    )
    assert sorted(executes(tree)) == ['allow_pickle', 'exec', 'pickle']


def test_the_rule_notices_a_breach():
    tree = ast.parse(
        'def f():\n    from reverie.agents.ppo import train\nimport reverie.models.tokenizer'
    )
    assert breaches('training', imported(tree)) == {'agents.ppo.train', 'models.tokenizer'}
    assert breaches('objectives', {'nn.core.build'}) and not breaches(
        'objectives', {'nn.dists.TwoHot'}
    )


def test_sources_are_one_protocol_and_nobody_asks_which_it_is():
    """Where sources differ, a method or attribute of `Source` says so."""
    asked = re.compile(r'(isinstance|getattr|hasattr)\((self\.)?source\b')
    files = [*ROOT.rglob('*.py'), *(ROOT.parent / 'benchmarks').rglob('*.py')]
    assert [p.name for p in files if asked.search(p.read_text())] == []
