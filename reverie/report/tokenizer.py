"""The tokenizer section of a report: frames, the parts the encoder was shown, reconstructions."""

import numpy as np

from reverie.evaluation import video
from reverie.report.html import legend, missing, picture
from reverie.report.run import RunFiles

ROWS = 8  # reconstructed frames in a row
NAMES = ('recon/truth', 'recon/mask_rates', 'recon/output', 'recon/mask')


def _row(label: str, frames: np.ndarray) -> str:
    cells = ''.join(picture(frame, f'{label} {i + 1}') for i, frame in enumerate(frames))
    return f'<span class="label">{label}</span>{cells}'


def section(run: RunFiles) -> str:
    """Truth, what the encoder saw and the output, one block per mask rate."""
    if 'env_options' in run.config:  # an agent that plays has no tokenizer
        return ''
    out = '<section><h2>Tokenizer reconstructions</h2>'
    if not all(name in run.samples for name in NAMES):
        return out + missing(run, 'samples.npz', 'reconstructions') + '</section>'
    truth, rates, output, mask = (run.samples[name] for name in NAMES)
    n = min(len(truth), ROWS)
    rgb = video.colourise(truth[:n])
    note = 'The encoder is shown what is not grey, the decoder returns the whole frame.'
    parts = [out, f'<p class="note">{note}</p>', legend(run, truth.shape[-1])]
    parts.append(f'<div class="recon" style="--n:{n}">')
    for i, rate in enumerate(np.ravel(rates)):
        decibel = float(video.psnr(truth, output[i]).mean())
        text = f'{100 * float(rate):.0f}% hidden: PSNR {decibel:.1f} dB over {len(truth)} frames'
        parts.append(f'<div class="rate">{text}</div>')
        if i == 0:
            parts.append(_row('truth', rgb))
        parts.append(_row('shown', video.hide(rgb, mask[i, :n])))
        parts.append(_row('output', video.colourise(output[i, :n])))
    return ''.join([*parts, '</div></section>'])
