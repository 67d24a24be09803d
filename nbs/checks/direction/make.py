"""Measure what the page checks/direction shows; every step keeps what has a file already.

    python nbs/checks/direction/make.py truth scores --model smollm2-135m
    python nbs/checks/direction/make.py truth scores --model gemma3-270m

`truth` patches every head of the swapped tasks, on forty pairs; `scores` scores the heads by gradients on both prompts.
"""

import argparse
import itertools
from pathlib import Path

from circuit_sae.bench.rivals import FIVE, Rival, score_cell
from circuit_sae.causal.patching import patch_heads
from circuit_sae.data.batches import bind_task
from circuit_sae.data.prompts import get_task
from circuit_sae.models.load import load_model, model_identity

HERE = Path(__file__).resolve().parent
EFFECTS = HERE.parents[2] / 'circuit_sae' / 'assets' / 'effects'
TASKS = ['ioi', 'induction', 'greater_than', 'docstring']
PLACES = {'positive': (1.0,), 'negative': (0.0,), 'both': (0.0, 1.0)}


def at_places(kind, metric, rules='', places=('positive', 'negative', 'both')):
    "Return a score for the gradient at each place; 'both' is the mean of the gradients at both prompts."
    return [Rival(f'{kind}, {at}', metric, PLACES[at], rules) for at in places]


SOFTER = 'softer softmax'  # at the positive, the table of rivals has it
GROUPS = {
    'places': [*at_places('AtP, logit_diff', 'logit_diff'), *at_places('AtP, prediction', 'prediction')],
    'softer': at_places(f'{SOFTER}, logit_diff', 'logit_diff', SOFTER, ('negative', 'both')),
    'EAP-IG': [Rival('EAP-IG, 5 steps, logit_diff', 'logit_diff', FIVE)],
}


def patch_swapped(model, name):
    "Patch every head of a swapped task, on the pairs of the effects that the package holds."
    task = get_task(name, n=40, seed=1000).swapped()
    out = EFFECTS / model_identity(model)['name'] / f'{task.name}-resample.safetensors'
    return patch_heads(model, task, out=out, batch_size=16)


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('steps', nargs='+', choices=['truth', 'scores'])
    parser.add_argument('--model', default='smollm2-135m')
    parser.add_argument('--tasks', nargs='+', default=TASKS)
    parser.add_argument('--draws', nargs='+', type=int, default=[0, 1])
    parser.add_argument('--groups', nargs='+', default=[*GROUPS])
    given = parser.parse_args()
    model = load_model(given.model)
    if 'truth' in given.steps:
        for task in given.tasks:
            print(patch_swapped(model, task), flush=True)
    if 'scores' in given.steps:
        for group, draw, task in itertools.product(given.groups, given.draws, given.tasks):
            bound = bind_task(model, get_task(task, n=20, seed=draw))
            print(score_cell(bound, HERE / 'cells', draw, group, GROUPS[group]), flush=True)
