"""Judge the circuits of `find_circuit` by the effects of all heads on other pairs: `python default.py default.csv`.

Every draw finds a circuit with the default settings on 100 pairs of one seed. The truth are the effects of 5 % or more
that come with the package or, for the tasks of `nbs/checks/fresh`, lie in its folder `truth`. They were measured on
other pairs. Only this script reads them. Rows that the file has already are not computed again, so give a new file
after a change of the method.

`--model gemma3-270m --draws 0 1 2 3 4` judges another model. Cells without a truth are named and left out. Several
processes share the work by `--tasks` and `--draws`, each with a file of its own, which `nbs/benchmarks/merge.py` joins.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from circuit_sae.causal.patching import HeadEffects
from circuit_sae.core import InputError, whole_file
from circuit_sae.data.prompts import TASKS, get_task
from circuit_sae.data.readers import read_examples
from circuit_sae.data.tasks import Task
from circuit_sae.find import find_circuit
from circuit_sae.models.load import load_model
from circuit_sae.truth.evaluate import average_precision
from circuit_sae.truth.references import reference

N_PAIRS = 100
FRESH = Path(__file__).parents[2] / 'checks' / 'fresh'


def pairs_of(task, seed):
    "Return a task with `N_PAIRS` pairs: drawn with this seed, or taken from the file of a fresh task in a new order."
    if task in TASKS:
        return get_task(task, n=N_PAIRS, seed=seed)
    examples = read_examples(FRESH / f'{task}.csv')
    order = np.random.default_rng(seed).permutation(len(examples))[:N_PAIRS]
    return Task(task, [examples[i] for i in order])


def truth_of(task, model):
    "Return the heads with an effect of at least 5 % on other pairs; raise `InputError` if they were not measured."
    if task in TASKS:
        return reference(task, model=model, effect=0.05)
    folder = FRESH / 'truth' / ('' if model == 'smollm2-135m' else model)
    return HeadEffects.load(folder / f'{task}.safetensors').reference(0.05)


def judge(model, name, task, seed, score):
    "Return the figures of one draw."
    true = truth_of(task, name)
    found = find_circuit(model, pairs_of(task, seed), score=score, n_epochs=1)
    hits = sum(head in true for head in found.circuit)
    return dict(
        f1=2 * hits / (len(found.circuit) + len(true)),
        ap=average_precision(found.nodes, true),
        ap_screen=average_precision(found.screen, true),
        chosen=len(found.circuit),
        true=len(true),
        patched=int(found.confirmation.patched.sum()),
        rows=int(np.isfinite(found.confirmation.effects.patched).sum()),
    )


if __name__ == '__main__':
    fresh = sorted(path.stem for path in (FRESH / 'truth').glob('*.safetensors'))
    parser = argparse.ArgumentParser()
    parser.add_argument('out', type=Path)
    parser.add_argument('--model', default='smollm2-135m')
    parser.add_argument('--tasks', nargs='+', default=[*TASKS, *fresh])
    parser.add_argument('--draws', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument('--scores', nargs='+', default=['flow', 'attribution'])
    parser.add_argument('--device', help="'cpu' or 'cuda'; default: a GPU if there is one")
    given = parser.parse_args()
    key = ['model', 'score', 'task', 'seed']
    rows = pd.read_csv(given.out).to_dict('records') if given.out.is_file() else []
    model = load_model(given.model, given.device)
    for seed in given.draws:
        for task in given.tasks:
            for score in given.scores:
                cell = dict(zip(key, (given.model, score, task, seed)))
                if any(all(row[k] == v for k, v in cell.items()) for row in rows):
                    continue
                try:
                    rows.append(cell | judge(model, given.model, task, seed, score))
                except InputError as error:
                    print(f'{cell}: {error}', flush=True)
                    continue
                with whole_file(given.out) as path:
                    pd.DataFrame(rows).to_csv(path, index=False)
                print(rows[-1], flush=True)
