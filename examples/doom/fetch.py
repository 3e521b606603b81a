"""Fetch Freedoom and a Doom engine from the Debian archive; needs apt and dpkg, but no root.

    python examples/doom/fetch.py --into .doom

apt works on lists and a cache of its own, in the folder; so nothing of the system changes, and it
does not matter how old the system's lists are.
"""

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence

import script

from reverie.errors import UserError

PACKAGES = ('freedoom', 'dsda-doom')
ENGINE = 'usr/games/dsda-doom'
WADS = 'usr/share/games/doom'
NEW = re.compile(r'^Inst (\S+) ', re.MULTILINE)
UNREACHABLE = re.compile(r'^W: (Failed to fetch .*)', re.MULTILINE)
MISSING = re.compile(r'^\s*(\S+) => not found', re.MULTILINE)


def private(folder: pathlib.Path) -> list[str]:
    """Options that let apt write into `folder` alone; what is installed is read from the system."""
    for part in ('state/lists/partial', 'cache/archives/partial'):
        (folder / part).mkdir(parents=True, exist_ok=True)
    options = {
        'Dir::State': folder / 'state',
        'Dir::State::status': '/var/lib/dpkg/status',
        'Dir::Cache': folder / 'cache',
        'Dir::Etc': '/etc/apt',
        'APT::Sandbox::User': 'root',  # its user for downloads may not enter the folder
    }
    return [word for name, value in options.items() for word in ('-o', f'{name}={value}')]


def run(command: Sequence[object], cwd: pathlib.Path | None = None) -> str:
    """Output and complaints of a command; raises UserError with the main one if it fails."""
    # LC_ALL: the plan is read by its English words.
    env = {**os.environ, 'LC_ALL': 'C'}
    words = [str(word) for word in command]
    done = subprocess.run(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd, env=env
    )
    if done.returncode:
        lines = done.stdout.strip().splitlines() or ['no message']
        said = next((line for line in lines if line.startswith('E:')), lines[-1])
        raise UserError(f'{words[0]} failed (exit {done.returncode}): {said}')
    return done.stdout


def needed(plan: str) -> list[str]:
    """Packages to download: `PACKAGES`, and what apt's simulated installation would add."""
    return sorted({*PACKAGES, *NEW.findall(plan)})


def libraries(root: pathlib.Path) -> str:
    """Folders of `root` with shared libraries, as a value of LD_LIBRARY_PATH."""
    found = {path.parent for path in root.rglob('*.so*') if path.is_file()}
    return ':'.join(str(path.absolute()) for path in sorted(found))


def fetch(into: pathlib.Path) -> pathlib.Path:
    """Download and unpack into `into`; -> the root of the unpacked tree, `into`/root.

    Raises UserError if apt is absent, lacks a package, or the engine lacks a library afterwards.
    """
    for program in ('apt-get', 'dpkg'):
        if shutil.which(program) is None:
            raise UserError(f'no {program} here; expected Debian or a system made from it')
    into = into.absolute()
    apt = ['apt-get', '-q', *private(into / 'apt')]
    print('reading the lists of packages', flush=True)
    lists = run([*apt, 'update'])
    try:
        plan = run([*apt, 'install', '--simulate', '--no-install-recommends', *PACKAGES])
    except UserError as error:
        # Lists that cannot be had are only a warning to apt, and the reason for the error here.
        failed = UNREACHABLE.search(lists)
        raise UserError(f'{error}; {failed[1]}' if failed else str(error)) from None
    names = needed(plan)
    archives, root = into / 'archives', into / 'root'
    shutil.rmtree(root, ignore_errors=True)
    for folder in (archives, root):
        folder.mkdir(exist_ok=True)
    print(f'downloading {len(names)} packages: {" ".join(names)}', flush=True)
    run([*apt, 'download', *names], cwd=archives)
    for name in names:
        # Newest last, in case an earlier download left an older version.
        files = sorted(archives.glob(f'{name}_*.deb'), key=lambda path: path.stat().st_mtime)
        run(['dpkg', '-x', files[-1], root])
    check(root)
    return root


def check(root: pathlib.Path) -> None:
    """Raise UserError unless the engine, all its libraries and both games are there."""
    for name in (ENGINE, f'{WADS}/freedoom1.wad', f'{WADS}/freedoom2.wad'):
        if not (root / name).is_file():
            raise UserError(f'{root} has no {name}; expected it in the packages {PACKAGES}')
    linked = run(['env', f'LD_LIBRARY_PATH={libraries(root)}', 'ldd', root / ENGINE])
    if missing := MISSING.findall(linked):
        raise UserError(f'{ENGINE} lacks {", ".join(missing)}; expected them in its dependencies')


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
    parser.add_argument(
        '--into', type=pathlib.Path, default=pathlib.Path('.doom'), help='folder (default: .doom)'
    )
    options = parser.parse_args(arguments)
    return script.run('fetch.py', lambda: print(f'ready in {fetch(options.into)}'))


if __name__ == '__main__':
    sys.exit(main())
