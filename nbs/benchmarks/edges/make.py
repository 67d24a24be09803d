"""Judge scores of edges by path patching; rows that the file has already are not computed again.

python nbs/benchmarks/edges/make.py nbs/benchmarks/edges/table.csv --draws 0 1 2 3 4
python nbs/benchmarks/edges/make.py nbs/benchmarks/edges/table.csv --model gemma3-270m --draws 0 1

Several processes share the work by `--tasks` and `--draws`, each with a file of its own, which
`nbs/benchmarks/merge.py` joins.

The truth are the edges that come with the package: 360 drawn pairs of heads, see truth.py. An edge is true if the
effect through its strongest input is at least 1 % of the change of the metric, or the smaller fraction that stands in
`SMALLER` for a task whose heads do not act through other heads. Only this script reads the truth.
"""

import argparse
import itertools
from pathlib import Path

import pandas as pd

from circuit_sae.score.edges import EDGE_LEAGUES, product_scores, score_edges
from circuit_sae.causal.patching import HeadEffects
from circuit_sae.core import whole_file
from circuit_sae.data.batches import bind_task
from circuit_sae.data.prompts import get_task
from circuit_sae.models.load import load_model
from circuit_sae.truth.evaluate import average_precision
from circuit_sae.truth.references import effects_file, reference_edges

N_PAIRS = 20
TASKS = ['ioi', 'induction', 'greater_than']
SMALLER = {('smollm2-135m', 'greater_than'): 0.001}
BY_TRUTH = 'product of the true effects'


def judge(scores, task, model):
    "Return the average precision of scores of edges, the fraction of true edges, and the smallest true effect."
    effect = SMALLER.get((model, task), 0.01)
    truth = reference_edges(f'{task}-drawn', model=model, effect=effect)
    chance = truth.mask()[truth.possible()].mean()
    return dict(average_precision=average_precision(scores, truth), chance=float(chance), effect=effect)


def compute(bound, method, model):
    "Return the scores of one method."
    if method == BY_TRUTH:
        return product_scores(HeadEffects.load(effects_file(bound.name, model)))
    return score_edges(bound, method=method)


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('out', type=Path)
    parser.add_argument('--model', default='smollm2-135m')
    parser.add_argument('--draws', nargs='+', type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument('--tasks', nargs='+', default=TASKS)
    parser.add_argument('--device', help="'cpu' or 'cuda'; default: a GPU if there is one")
    given = parser.parse_args()
    rows = pd.read_csv(given.out).to_dict('records') if given.out.is_file() else []
    done = {(row['model'], row['method'], row['task'], row['draw']) for row in rows}
    model = load_model(given.model, given.device)
    for draw, task, method in itertools.product(given.draws, given.tasks, [*EDGE_LEAGUES, BY_TRUTH]):
        if (given.model, method, task, draw) in done:
            continue
        bound = bind_task(model, get_task(task, n=N_PAIRS, seed=draw))
        cell = dict(model=given.model, method=method, task=task, draw=draw)
        rows.append(cell | judge(compute(bound, method, given.model), task, given.model))
        with whole_file(given.out) as path:
            pd.DataFrame(rows).to_csv(path, index=False)
        print(rows[-1], flush=True)
