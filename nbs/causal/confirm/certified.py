"""Certify what `find_circuit` returns by default: `python certified.py certified.csv`.

For each model and task: the verdict line, the first reason that prevents it, and the seconds that the certificate takes
beyond `find_circuit`. `refused_by_find` is the line that `find` itself prints if it knows or expects a reason. Rows
that the file has already are not computed again. Several processes share the work by `--models` and `--tasks`, each
with a file of its own, which `nbs/benchmarks/merge.py` joins.
"""

import argparse
import time
from pathlib import Path

import pandas as pd

from circuit_sae.core import InputError, whole_file
from circuit_sae.data.prompts import get_task
from circuit_sae.find import find_circuit
from circuit_sae.models.load import load_model
from circuit_sae.trust.certificate import certify, preview

CELLS = {
    'smollm2-135m': ['ioi', 'greater_than', 'docstring', 'induction'],
    'gemma3-270m': ['ioi', 'greater_than', 'docstring'],
}


def judge(model, task, n, n_epochs):
    "Return the figures of one circuit."
    start = time.perf_counter()
    found = find_circuit(model, get_task(task, n=n), **({} if n_epochs is None else dict(n_epochs=n_epochs)))
    finding = time.perf_counter() - start
    known = preview(found, model)
    start = time.perf_counter()
    certificate = certify(found, model)
    reason = certificate.fatal[0] if certificate.fatal else None
    return dict(
        heads=len(found.circuit),
        verdict=certificate.verdict,
        line=certificate.summary,
        reason='' if reason is None else f'{reason.rule}: {reason.message}',
        refused_by_find=known if 'not certified' in known or 'may refuse' in known else '',
        seconds_find=round(finding, 1),
        seconds_beyond=round(time.perf_counter() - start, 1),
    )


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('out', type=Path)
    parser.add_argument('--models', nargs='+', default=[*CELLS])
    parser.add_argument('--tasks', nargs='+', help='default: the built-in tasks that the model can do')
    parser.add_argument('--n', type=int, default=250, help='pairs')
    parser.add_argument('--n_epochs', type=int, help='epochs of the autoencoder, which the verdict does not use')
    parser.add_argument('--device', help="'cpu' or 'cuda'; default: a GPU if there is one")
    given = parser.parse_args()
    rows = pd.read_csv(given.out).fillna('').to_dict('records') if given.out.is_file() else []
    for name in given.models:
        tasks = given.tasks or CELLS[name]
        todo = [t for t in tasks if (name, t, given.n) not in {(r['model'], r['task'], r['pairs']) for r in rows}]
        model = load_model(name, given.device) if todo else None
        for task in todo:
            try:
                rows.append(dict(task=task, model=name, pairs=given.n) | judge(model, task, given.n, given.n_epochs))
            except InputError as error:
                print(f'{name}, {task}: {error}', flush=True)
                continue
            with whole_file(given.out) as path:
                pd.DataFrame(rows).to_csv(path, index=False)
            print(rows[-1], flush=True)
