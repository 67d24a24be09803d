"""Compare the sizes of 90 %-faithful circuits by the rankings of several methods.

python nbs/causal/minimal/sizes.py nbs/causal/minimal/sizes.csv --models smollm2-135m gemma3-270m --draws 0 1 2

Every method gets the same `--n` pairs. `find` ranks by the effects of `find_circuit` (patched heads) and by its score
(the others); `EAP-IG` (10 steps) and `attribution patching` rank by their signed attributions, `random` by chance.
For each ranking, `--n_judge` other pairs give the number of heads that are needed for 90 % faithfulness: the first half
of them for the search (grow, then prune), the second half for the figures. A random order is not pruned.

Rows that the file has already are not computed again. Several processes share the work by `--models`, `--tasks` and
`--draws`, each with a file of its own, which `nbs/benchmarks/merge.py` joins.
"""

import argparse
import itertools
from pathlib import Path

import numpy as np
import pandas as pd

from circuit_sae.causal.minimal import SetFaithfulness, faithful_circuit, grow
from circuit_sae.core import InputError, whole_file
from circuit_sae.data.batches import BoundTask, bind_task
from circuit_sae.data.prompts import get_task
from circuit_sae.find import find_circuit
from circuit_sae.models.load import load_model
from circuit_sae.score.attribution import attribute_heads

CELLS = {
    'smollm2-135m': ['ioi', 'greater_than', 'docstring', 'induction'],
    'gemma3-270m': ['ioi', 'greater_than', 'docstring'],
}
METHODS = ['find', 'EAP-IG', 'attribution patching', 'random']


def split(bound, n):
    "Return the first `n` pairs of a task, and the others."
    t, total = bound.tokens, bound.n
    rows = [*range(n, total), *range(total + n, 2 * total)]
    columns = [[column[i] for i in rows] for column in (t.ids, t.answers, t.wrongs, t.texts)]
    tokens = type(t)(columns[0], np.arange(len(rows)) < total - n, *columns[1:])
    return bound.take(n), BoundTask(bound.model, bound.task, tokens)


def scores_of(method, bound):
    "Return the signed scores of one method."
    if method == 'find':
        return find_circuit(bound, n_epochs=1).nodes
    return attribute_heads(bound, steps=10 if method == 'EAP-IG' else None)


def random_size(bound, draw, target):
    "Return the number of heads that a random order needs."
    measure = SetFaithfulness(bound.take(max(1, bound.n // 2)))
    size, _ = grow(measure, np.random.default_rng(draw).permutation(measure.n), target)
    return dict(size=size)


def judge(method, bound, n, draw, target):
    "Return the sizes of one method."
    first, others = split(bound, n)
    if method == 'random':
        return random_size(others, draw, target)
    found = faithful_circuit(others, scores=scores_of(method, first), target=target)
    f = found.figures
    return dict(
        size=found.size,
        pruned=len(found),
        faithfulness=f['faithfulness'],
        faithfulness_se=f['faithfulness_se'],
        best_random=max(f['random']),
    )


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('out', type=Path)
    parser.add_argument('--models', nargs='+', default=[*CELLS])
    parser.add_argument('--tasks', nargs='+', help='default: the built-in tasks that the model can do')
    parser.add_argument('--draws', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument('--methods', nargs='+', default=METHODS)
    parser.add_argument('--n', type=int, default=80, help='pairs for the ranking')
    parser.add_argument('--n_judge', type=int, default=24, help='pairs for the sizes')
    parser.add_argument('--target', type=float, default=0.9, help='faithfulness')
    parser.add_argument('--device', help="'cpu' or 'cuda'; default: a GPU if there is one")
    given = parser.parse_args()
    rows = pd.read_csv(given.out).to_dict('records') if given.out.is_file() else []
    about = dict(pairs=given.n, judged=given.n_judge, target=given.target)
    for name in given.models:
        model = load_model(name, given.device)
        tasks = given.tasks or CELLS[name]
        for draw, task, method in itertools.product(given.draws, tasks, given.methods):
            cell = dict(model=name, task=task, draw=draw, method=method) | about
            if any(all(row.get(k) == v for k, v in cell.items()) for row in rows):
                continue
            bound = bind_task(model, get_task(task, n=given.n + given.n_judge, seed=draw))
            try:
                rows.append(cell | judge(method, bound, given.n, draw, given.target))
            except InputError as error:
                print(f'{cell}: {error}', flush=True)
                continue
            with whole_file(given.out) as path:
                pd.DataFrame(rows).to_csv(path, index=False)
            print(rows[-1], flush=True)
