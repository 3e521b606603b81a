"""The README's quick start runs as it stands, and the public names are explained."""

import inspect
import pathlib
import pydoc
import re

import numpy as np
import pytest

import reverie

README = (pathlib.Path(__file__).parents[1] / 'README.md').read_text()


@pytest.mark.docs
def test_the_quick_start_trains_scores_dreams_and_plays(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r'```python\n(.*?)```', README, flags=re.S)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    from reverie.commands.play import serving

    played = []
    monkeypatch.setattr(serving, 'play', lambda name, **options: played.append(name))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code, 'README.md', 'exec'), names)  # the repository's own text
    assert played == ['runs/first'] and 'random play:' in capsys.readouterr().out
    dream = names['dream']
    assert dream['dream'].shape == dream['truth'].shape and np.isfinite(dream['dream']).all()
    again = reverie.load('runs/first')
    assert again.agent.spec == names['env'].spec


@pytest.mark.parametrize('name', reverie.__all__)
def test_public_names_are_explained(name):
    assert name in dir(reverie) and inspect.getdoc(getattr(reverie, name))
    assert name in pydoc.plain(pydoc.render_doc(reverie))


def test_the_readme_is_short_and_its_links_lead_somewhere():
    assert len(README.split()) < 700
    root = pathlib.Path(__file__).parents[1]
    for link in re.findall(r'\]\((?!http)([^)#]+)\)', README):
        assert (root / link).exists(), link
