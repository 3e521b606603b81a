"""Who may import whom: the rule of docs/ARCHITECTURE.md."""

import ast
import pathlib

import pytest

import reverie

ROOT = pathlib.Path(reverie.__file__).parent
EVERYTHING = {'nn', 'models', 'objectives', 'agents', 'data', 'envs', 'training', 'evaluation', 'programs'}
EVERYTHING |= {'serve', 'cli'}
ALLOWED = {
    'types': set(),
    'nn': set(),
    'models': {'nn'},
    'objectives': {'nn.dists'},
    'agents': {'nn', 'models', 'objectives', 'envs.device'},
    'data': set(),
    'envs': set(),
    'training': {'data', 'envs'},
    'evaluation': {'envs', 'data'},
    'programs': EVERYTHING - {'serve', 'cli'},
    'serve': EVERYTHING - {'cli'},
    'cli': EVERYTHING,
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
    allowed = ALLOWED[package] | {'types', '__version__', package}
    return {n for n in names if not any(n == a or n.startswith(f'{a}.') for a in allowed)}


@pytest.mark.parametrize('path', sorted(ROOT.rglob('*.py')), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_imports_only_what_its_package_may(path):
    package = path.relative_to(ROOT).with_suffix('').parts[0]
    if package == '__init__':
        return
    assert not breaches(package, imported(ast.parse(path.read_text())))


def test_the_rule_notices_a_breach():
    tree = ast.parse('def f():\n    from reverie.agents.ppo import train\nimport reverie.models.tokenizer')
    assert breaches('training', imported(tree)) == {'agents.ppo.train', 'models.tokenizer'}
    assert breaches('objectives', {'nn.core.build'}) and not breaches('objectives', {'nn.dists.TwoHot'})
