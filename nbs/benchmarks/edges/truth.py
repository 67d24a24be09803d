"""Draw pairs of heads and measure them by path patching: the truth of the page; files that exist are kept.

python nbs/benchmarks/edges/truth.py --model gemma3-270m --tasks ioi

A second measurement, on other pairs, says how well any score can agree with the first:
python nbs/benchmarks/edges/truth.py --tasks greater_than --pairs 6 --seed 2000 --out nbs/benchmarks/edges/again

The files belong to circuit_sae/assets/effects/MODEL/. A draw uses the exhaustive effects of heads, and no score of
edges.
"""

import argparse
from pathlib import Path

from circuit_sae.causal.patching import HeadEffects
from circuit_sae.causal.paths import draw_edges, patch_paths
from circuit_sae.data.prompts import get_task
from circuit_sae.models.load import load_model
from circuit_sae.truth.references import effects_file

N_EDGES, N_PAIRS, SEED = 360, 12, 1000
TASKS = ['ioi', 'induction', 'greater_than']


def measure(model, name, task, n_pairs=N_PAIRS, seed=SEED):
    "Return the effects of the drawn edges of a task on its pairs of one seed, with the record of the draw."
    edges, record = draw_edges(HeadEffects.load(effects_file(task, name)), n=N_EDGES)
    found = patch_paths(model, get_task(task, n=n_pairs, seed=seed), edges=edges)
    found.made_from['draw'] = record
    return found


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--model', default='smollm2-135m')
    parser.add_argument('--tasks', nargs='+', default=TASKS)
    parser.add_argument('--pairs', type=int, default=N_PAIRS, help='pairs of prompts')
    parser.add_argument('--seed', type=int, default=SEED, help='seed of the pairs')
    parser.add_argument('--out', type=Path, help='folder; default: the effects that come with the package')
    given = parser.parse_args()
    model = load_model(given.model)
    for task in given.tasks:
        path = (given.out or effects_file(task, given.model).parent) / f'{task}-drawn-edges.json'
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            found = measure(model, given.model, task, given.pairs, given.seed)
            found.save(path)
            print(found, flush=True)
