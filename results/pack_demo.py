"""Put the model of a finished demo run into the package, with the scores of its rounded weights.

    python results/pack_demo.py runs/demo-breakout --results results/demo/weights.json

The weights are kept in half precision; what was packed is unpacked, scored and measured on the
run's own dataset, and the scores are packed with it.
"""

import argparse
import pathlib
import sys
import tempfile
from collections.abc import Sequence

from reverie.commands import packaged
from reverie.commands.experiment import load
from reverie.errors import UserError
from reverie.evaluation.results import provenance, save
from reverie.training.legacy import read_config


def run(args: argparse.Namespace) -> None:
    packed: pathlib.Path = args.out
    origin = provenance()  # before --out makes the checkout a changed one
    packaged.pack(args.run, packed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = packaged.unpack(packed, pathlib.Path(temporary))
        experiment, params = load(folder, [pathlib.Path(read_config(args.run)['data'])])
        scores = [folder / 'scores.json']
        record = experiment.evaluate(folder, params, args.episodes, paths=scores)
        packaged.repack(folder, packed)
    size = sum(path.stat().st_size for path in packed.rglob('*') if path.is_file())
    print(f'{packed}: {size:,} bytes, SHA-256 {packaged.checksum(packed)}')
    packing = {
        'command': f'python results/pack_demo.py {args.run} --results {args.results}',
        **origin,
    }
    save(args.results, record | packing | {'bytes': size, 'sha256': packaged.checksum(packed)})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('run', type=pathlib.Path, help='folder of a finished run of one seed')
    parser.add_argument('--out', type=pathlib.Path, default=packaged.home())
    parser.add_argument('--results', type=pathlib.Path, required=True)
    parser.add_argument('--episodes', type=int, default=128, help='of each read-out')
    args = parser.parse_args(arguments)
    try:
        run(args)
    except UserError as error:
        print(f'pack_demo.py: {error}', file=sys.stderr)
        return error.code
    return 0


if __name__ == '__main__':
    sys.exit(main())
