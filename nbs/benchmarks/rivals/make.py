"""Score every cell of the table of rivals that has no file yet.

python nbs/benchmarks/rivals/make.py --model smollm2-135m --draws 0 1 2
python nbs/benchmarks/rivals/make.py --model gemma3-270m --tasks ioi induction --draws 0 1 2
"""

import argparse
import itertools
import random
from pathlib import Path

from circuit_sae.bench.rivals import GROUPS, score_cell
from circuit_sae.data.batches import bind_task
from circuit_sae.data.prompts import TASKS, get_task
from circuit_sae.data.readers import read_examples
from circuit_sae.data.tasks import Task
from circuit_sae.models.load import load_model

HERE = Path(__file__).resolve().parent
FRESH = HERE.parents[1] / 'checks' / 'fresh'
DEVELOPED = ['ioi', 'induction', 'languages', 'plurals']
JUDGED = ['greater_than', 'docstring', 'agreement', 'capitals', 'pronouns', 'succession', 'opposites']
N_PAIRS = 20


def draw_task(name, draw):
    "Return 20 pairs: of a built-in task with this seed, or drawn from the pairs of a fresh task."
    if name in TASKS:
        return get_task(name, n=N_PAIRS, seed=draw)
    pairs = random.Random(draw).sample(read_examples(FRESH / f'{name}.csv'), N_PAIRS)
    return Task.from_data(pairs, name, seed=draw)


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--model', default='smollm2-135m')
    parser.add_argument('--tasks', nargs='+', default=JUDGED + DEVELOPED)
    parser.add_argument('--draws', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument('--groups', nargs='+', default=[*GROUPS, 'flow', 'routes'])
    parser.add_argument('--device', help="'cpu' or 'cuda'; default: a GPU if there is one")
    given = parser.parse_args()
    model = load_model(given.model, given.device)
    for group, draw, name in itertools.product(given.groups, given.draws, given.tasks):
        print(score_cell(bind_task(model, draw_task(name, draw)), HERE / 'cells', draw, group), flush=True)
