"""Count heads that `confirm_heads` names although there is nothing to find.

python false_heads.py false_heads.csv --seeds 0 1 2

Several processes share the work by `--seeds` and `--families`, each with a file of its own, which
`nbs/benchmarks/merge.py` joins. Rows that the file has already are not computed again.

`intact`: planted models; a head outside the planted circuit is false. `cut`: the same models with the output weights of
the planted heads set to zero; every head is false. `random answers`: answers and wrong answers drawn from other pairs;
every head is false.
"""

import argparse
import itertools
from pathlib import Path

import pandas as pd

from circuit_sae.bench.calibration import cut_out, random_answers
from circuit_sae.causal.confirm import confirm_heads, split_pairs
from circuit_sae.core import whole_file
from circuit_sae.data.batches import bind_task
from circuit_sae.score.flow import difference_flow
from circuit_sae.truth.planted import PLANTS, plant

CASES = 'intact', 'cut', 'random answers'


def run(case, family, seed, n, device='cpu'):
    "Return the number of named, false and missed heads of one run."
    planted = plant(family, seed=100 + seed, n=n)
    planted.model.original_model.to(device)
    task = random_answers(planted.task, seed) if case == 'random answers' else planted.task
    if case == 'cut':
        cut_out(planted)
    bound = bind_task(planted.model, task)
    first, pairs, same = split_pairs(bound.n, 20, 60)
    found = confirm_heads(bound, None, difference_flow(bound.take(first)), pairs, same)
    named = set(found.circuit_heads())
    true = set(planted.truth) if case == 'intact' else set()
    row = dict(
        case=case, family=family, seed=seed, given=n, pairs=bound.n, patched=int(found.patched.sum()), named=len(named)
    )
    return row | dict(false=len(named - true), missed=len(true - named))


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('out', type=Path)
    parser.add_argument('--seeds', nargs='+', type=int, default=list(range(20)))
    parser.add_argument('--families', nargs='+', default=list(PLANTS))
    parser.add_argument('--device', default='cpu', help="'cpu', the default, or 'cuda'; the models are tiny")
    given = parser.parse_args()
    rows = pd.read_csv(given.out).to_dict('records') if given.out.is_file() else []
    done = {(row['case'], row['family'], row['seed'], row.get('given')) for row in rows}
    for seed, family, n, case in itertools.product(given.seeds, given.families, (24, 60), CASES):
        if (case, family, seed, n) in done:
            continue
        rows.append(run(case, family, seed, n, given.device))
        with whole_file(given.out) as path:
            pd.DataFrame(rows).to_csv(path, index=False)
