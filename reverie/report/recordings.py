"""The section of a report on dreams of held-out recordings."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from reverie.report.html import cell, row, table
from reverie.report.run import RunFiles

ROWS = {
    'tokenizer': 'Encoded and decoded',
    'true': 'Dream under the true actions',
    'shuffled': "Dream under another window's actions",
    'none': 'Dream without actions',
    'held': 'The last frame held still',
}
METRICS = {'psnr': ('PSNR, dB', 2), 'ssim': ('SSIM', 3), 'lpips': ('LPIPS', 3)}


def mean(seeds: Sequence[Mapping[str, Any]], name: str, metric: str) -> float:
    """Mean over seeds of a metric of the row `name` of ROWS."""
    values = [seed[name][metric] for seed in seeds]
    return float(np.mean([v['mean'] if isinstance(v, Mapping) else v for v in values]))


def _likeness(seeds: list[Mapping[str, Any]]) -> str:
    metrics = [metric for metric in METRICS if metric in seeds[0]['tokenizer']]
    rows = []
    for name, words in ROWS.items():
        if name in seeds[0]:
            numbers = [f'{mean(seeds, name, m):.{METRICS[m][1]}f}' for m in metrics]
            rows.append(row([cell(words), *map(cell, numbers)]))
    return table(['', *(METRICS[metric][0] for metric in metrics)], rows)


def _sentences(seeds: list[Mapping[str, Any]]) -> list[str]:
    """Sentences on the worth of actions and on the camera, for each seed."""
    out = []
    for i, seed in enumerate(seeds):
        who = '' if len(seeds) == 1 else f'Seed {i + 1} of {len(seeds)}: '
        for name, by in seed['differences'].items():
            psnr = by['psnr']
            low_high = psnr.get('ci95')
            ci = '' if low_high is None else (
                f' (95% {low_high[0]:.2f} to {low_high[1]:.2f}, t over {psnr["n"]} blocks of the recording)'
            )  # fmt: skip
            out.append(f'{who}{name}: {psnr["mean"]:+.2f} dB{ci}.')
        for name, turned in seed.get('steering', {}).items():
            out.append(
                f'{who}{name} as far as it goes, either way: the picture follows in '
                f'{turned["right"]:.0%} of {turned["n"]} dreams.'
            )
    return out


def sentence(seeds: Sequence[Mapping[str, Any]]) -> str:
    """Worth of the dreams in one sentence, the mean over seeds."""
    beside = {
        'true - held': 'the last frame held still',
        'true - shuffled': "dreams under another window's actions",
    }
    gains = [
        f'{np.mean([seed["differences"][name]["psnr"]["mean"] for seed in seeds]):+.2f} dB against {words}'
        for name, words in beside.items()
        if name in seeds[0]['differences']
    ]
    return f'Likeness of dreamed frames to the recording: {", ".join(gains)}.'


def section(run: RunFiles) -> str:
    """Likeness of dreams to recordings, what actions are worth, steering; '' where none were taken."""
    seeds = run.scores.get('recordings')
    if not isinstance(seeds, list) or not seeds:
        return ''
    first = seeds[0]
    which = 'held-out recordings' if first['held_out'] else 'recordings it was trained on'
    note = (
        f'{first["contexts"]} contexts of {which}: {first["context"]} frames are given, '
        f'{first["horizon"]} dreamed.'
    )
    sentences = '<br>'.join(_sentences(seeds))
    return (
        f'<section><h2>Dreams beside recordings</h2><p>{note}</p>{_likeness(seeds)}'
        f'<p>{sentences}</p></section>'
    )
