"""Dreamed against real return of policies, as the report shows it."""

import json

from reverie import report
from reverie.evaluation import ranking
from tests.report.test_report import HOSTILE, Tags, write_run


def test_policies_stand_in_the_plot_and_the_table_of_dreamed_and_real_return(tmp_path):
    folder = write_run(tmp_path)
    figure = lambda x: {'mean': x, 'per_seed': [x], 'ci95': None, 'n': 1, 'interval': None}
    policies = [
        {'name': name, 'dreamed': figure(a), 'real': figure(b)}
        for name, a, b in (('random', 0.5, 0.25), (HOSTILE, 2.0, 1.5))
    ]
    drift = [
        {
            f'{who}_{what}': figure(x)
            for who, x in (('dreamed', 0.9), ('real', 0.3))
            for what in ('reward', 'on')
        }
        for _ in ranking.SPANS
    ]
    found = {
        'starts': 64, 'steps': 100, 'discount': 0.95, 'policies': policies, 'drift': drift,
        'correlation': figure(1.0), 'low': figure(0.5), 'high': figure(1.0), 'place': figure(1.0),
    }  # fmt: skip
    cells = {'recall': figure(0.8), 'precision': figure(0.9)}
    channel = {
        'name': 'ball', 'tokenizer': cells, 'dream': [cells] * 4,
        'ceiling': [{'recall': 0.9, 'precision': 0.9}] * 4,
    }  # fmt: skip
    trust = {
        'windows': 64, 'context': 8, 'steps': [[1, 1], [2, 4], [5, 8], [9, 16]],
        'frames': [1, 2, 3, 4], 'channels': [channel], 'ranking': found,
    }  # fmt: skip
    scores = json.loads((folder / 'scores.json').read_text())
    (folder / 'scores.json').write_text(json.dumps(scores | {'trust': trust}))
    page = report.write(folder).read_text()
    Tags(page)
    assert page.count('class="main dot"') == 2 and '<g><title>random: 0.500, 0.250</title>' in page
    assert 'the best dreamed one is number 1 of 2 in the game' in page and HOSTILE not in page
    assert '0.89 (0.90)' in page  # recall of the dream, as a share of the game's
    assert page.count('<td class="low">0.900</td>') == 2 * len(ranking.SPANS)
