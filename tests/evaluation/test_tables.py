"""Rows of a results record: every figure beside its interval, its kind and n."""

from reverie.evaluation import tables
from reverie.evaluation.statistics import derive

PLAYED = {
    'other': {'sampled': [[7.0]]},
    'imagination': {'sampled': [[2.0], [4.0]], 'greedy': [[150.0], [250.0]]},
    'random': {'sampled': [[0.0, 2.0]]},
    'bc': {'sampled': [[1.0], [2.0]], 'greedy': [[0.0], [0.0]]},
}


def test_rows_are_in_the_order_of_the_names_and_carry_kind_and_n():
    # half an interval over two values is 12.706 times half their distance
    lines = tables.markdown(
        tables.score_rows(derive(PLAYED, None)), names={'imagination': '**ours**'}
    ).splitlines()
    assert lines[2:] == [
        '| Random | 1.00 | -11.71 to 13.71 |  |  | t over 2 episodes |',
        '| BC from scratch | 1.50 | -4.85 to 7.85 | 0.00 | 0.00 to 0.00 | t over 2 seeds |',
        '| **ours** | 3.00 | -9.71 to 15.71 | 200 | -435 to 835 | t over 2 seeds |',
        '| other | 7.00 |  |  |  | none, n = 1 |',
    ]


def test_differences_are_rows_of_their_own():
    lines = tables.markdown(tables.difference_rows(derive(PLAYED, None)), 'paired').splitlines()
    assert lines[0].startswith('| paired | sampled |')
    name = 'Imagination RL minus BC from scratch'
    assert lines[2:] == [f'| {name} | 1.50 | -4.85 to 7.85 | 200 | -435 to 835 | t over 2 seeds |']


def test_a_figure_in_a_line_of_text():
    score = derive(PLAYED, None)['score']
    assert tables.text(score['bc']) == '1.50 (-4.85 to 7.85, t over 2 seeds)'
    assert tables.text(score['other']) == '7.00 (n = 1)'
