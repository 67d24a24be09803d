"""Count heads that `confirm_heads` names although there is nothing to find: `python false_heads.py false_heads.csv 20`.

A third argument is the first seed.

`intact`: planted models; a head outside the planted circuit is false. `cut`: the same models with the output weights of
the planted heads set to zero; every head is false. `random answers`: answers and wrong answers drawn from other pairs;
every head is false.
"""

import sys

import pandas as pd

from circuit_sae.bench.calibration import cut_out, random_answers
from circuit_sae.causal.confirm import confirm_heads, split_pairs
from circuit_sae.data.batches import bind_task
from circuit_sae.score.flow import difference_flow
from circuit_sae.truth.planted import PLANTS, plant

CASES = 'intact', 'cut', 'random answers'


def run(case, family, seed, n):
    "Return the number of named, false and missed heads of one run."
    planted = plant(family, seed=100 + seed, n=n)
    task = random_answers(planted.task, seed) if case == 'random answers' else planted.task
    if case == 'cut':
        cut_out(planted)
    bound = bind_task(planted.model, task)
    first, pairs, same = split_pairs(bound.n, 20, 60)
    found = confirm_heads(bound, None, difference_flow(bound.take(first)), pairs, same)
    named = set(found.circuit_heads())
    true = set(planted.truth) if case == 'intact' else set()
    row = dict(case=case, family=family, seed=seed, pairs=bound.n, patched=int(found.patched.sum()), named=len(named))
    return row | dict(false=len(named - true), missed=len(true - named))


if __name__ == '__main__':
    rows = []
    begin = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    for seed in range(begin, begin + int(sys.argv[2])):
        for family in PLANTS:
            for n in (24, 60):
                rows += [run(case, family, seed, n) for case in CASES]
                pd.DataFrame(rows).to_csv(sys.argv[1], index=False)
