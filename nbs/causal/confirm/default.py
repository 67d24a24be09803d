"""Judge the circuits of `find_circuit` by the effects of all heads on other pairs: `python default.py default.csv`.

Every draw finds a circuit with the default settings on 100 pairs of one seed. The truth are the effects of 5 % or more
that come with the package, measured on forty pairs of another seed. Only this script reads them. Rows that the file
has already are not computed again.
"""

import argparse
from pathlib import Path

import pandas as pd

from circuit_sae.core import whole_file
from circuit_sae.data.prompts import TASKS, get_task
from circuit_sae.find import find_circuit
from circuit_sae.models.load import load_model
from circuit_sae.truth.evaluate import average_precision
from circuit_sae.truth.references import reference

N_PAIRS = 100


def judge(model, name, task, seed, score):
    "Return the figures of one draw."
    found = find_circuit(model, get_task(task, n=N_PAIRS, seed=seed), score=score, n_epochs=1)
    true = reference(task, model=name, effect=0.05)
    hits = sum(head in true for head in found.circuit)
    return dict(
        f1=2 * hits / (len(found.circuit) + len(true)),
        ap=average_precision(found.nodes, true),
        ap_screen=average_precision(found.screen, true),
        chosen=len(found.circuit),
        true=len(true),
        patched=int(found.confirmation.patched.sum()),
    )


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('out', type=Path)
    parser.add_argument('--model', default='smollm2-135m')
    parser.add_argument('--tasks', nargs='+', default=list(TASKS))
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument('--scores', nargs='+', default=['flow', 'attribution'])
    given = parser.parse_args()
    key = ['model', 'score', 'task', 'seed']
    rows = pd.read_csv(given.out).to_dict('records') if given.out.is_file() else []
    model = load_model(given.model)
    for seed in given.seeds:
        for task in given.tasks:
            for score in given.scores:
                cell = dict(zip(key, (given.model, score, task, seed)))
                if any(all(row[k] == v for k, v in cell.items()) for row in rows):
                    continue
                rows.append(cell | judge(model, given.model, task, seed, score))
                with whole_file(given.out) as path:
                    pd.DataFrame(rows).to_csv(path, index=False)
                print(rows[-1], flush=True)
