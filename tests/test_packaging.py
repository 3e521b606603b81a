"""The wheel, installed beside nothing of the checkout, has all that the commands need."""

import os
import pathlib
import subprocess
import sys
import zipfile

import pytest

from reverie.serve import server

pytestmark = [pytest.mark.slow, pytest.mark.compat]

ROOT = pathlib.Path(__file__).parent.parent
LOOK = """
import reverie
from reverie.serve import server
print(reverie.__file__)
print(server.page())
"""


def run(*command: object, **options) -> str:
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=300, **options
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp('wheel')
    run(sys.executable, '-m', 'build', '--wheel', '--no-isolation', '--outdir', folder, ROOT)
    (path,) = folder.glob('reverie-*.whl')
    return path


@pytest.fixture(scope='module')
def outside(wheel, tmp_path_factory):
    """-> (environment, folder): the wheel is what `reverie` means there."""
    site, folder = tmp_path_factory.mktemp('site'), tmp_path_factory.mktemp('elsewhere')
    pip = [sys.executable, '-m', 'pip', '--quiet', '--disable-pip-version-check', 'install']
    run(*pip, '--no-deps', '--no-index', '--no-compile', '--target', site, wheel)
    return {**os.environ, 'PYTHONPATH': str(site), 'JAX_PLATFORMS': 'cpu'}, folder, site


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if '.dist-info/' not in name}
    listed = run(
        'git', 'ls-files', '--cached', '--others', '--exclude-standard', 'reverie', cwd=ROOT
    )
    assert names == {name for name in listed.splitlines() if (ROOT / name).exists()}
    assert {
        'reverie/py.typed',
        'reverie/serve/page.html',
        'reverie/serve/page.js',
        'reverie/report/report.css',
    } <= names


def test_it_works_outside_of_the_checkout(outside):
    env, folder, site = outside
    where, _, page = run(sys.executable, '-c', LOOK, env=env, cwd=folder).partition('\n')
    assert pathlib.Path(where).is_relative_to(site)
    assert page.strip() == server.page().strip()
    help = run(site / 'bin' / 'reverie', 'doctor', '--help', env=env, cwd=folder)
    assert 'which device' in help
    listed = run(sys.executable, '-m', 'reverie.cli', '--help', env=env, cwd=folder)
    assert 'reverie COMMAND' in listed
