"""Compare two nulls for attributions on planted models: `python calibration.py calibration.csv --seeds 0 1 2`.

`intact`: planted models. `cut`: the same models with the output weights of the planted heads set to zero. `random
answers`: answers and wrong answers drawn from other pairs. In the last two, no head knows the answer.

`other answers` is `attribution_null`, `other answers, flow` is `flow_null`. `two positives` compares the size of a
head's attribution between positive and negative with its attributions between the positives of two different pairs,
towards the answers of the first. Rows that the file has already are not computed again. Several processes share the
work by `--seeds` and `--families`, each with a file of its own, which `nbs/benchmarks/merge.py` joins.
"""

import argparse
import itertools
from pathlib import Path

import numpy as np
import pandas as pd

from circuit_sae.bench.calibration import cut_out, random_answers
from circuit_sae.core import InputError, whole_file
from circuit_sae.data.batches import BoundTask, bind_task
from circuit_sae.score.attribution import attribute_heads, ranking_settings
from circuit_sae.score.null import attribution_null, flow_null
from circuit_sae.truth.planted import PLANTS, plant

CASES = 'intact', 'cut', 'random answers'
NULLS = ['other answers', 'other answers, flow', 'two positives']
N_PAIRS = 12


def two_positives(bound):
    "Return for each head the fraction of shifts, the real pairs included, with an attribution of at least its size."
    t, n = bound.tokens, bound.n
    settings = ranking_settings(bound)
    real = np.abs(attribute_heads(bound, **settings).by_pair.sum(0))
    reached = np.ones(len(real))
    for k in range(1, n):
        others = [t.ids[(i + k) % n] for i in range(n)]
        shifted = BoundTask(bound.model, bound.task, t._replace(ids=[*t.ids[:n], *others]))
        reached += np.abs(attribute_heads(shifted, **settings).by_pair.sum(0)) >= real
    return reached / n


def named_by(null, bound, seed):
    "Return which heads a null names, and which have p ≤ .1, bool [head] each; none if there is nothing to attribute."
    try:
        return _named_by(null, bound, seed)
    except InputError as e:
        if e.code != 'no-difference':  # a model that was cut may answer both prompts alike
            raise
    nothing = np.zeros(bound.model.cfg.n_layers * bound.model.cfg.n_heads, dtype=bool)
    return nothing, nothing


def _named_by(null, bound, seed):
    "Return which heads a null names, and which have p ≤ .1, bool [head] each."
    if null == 'two positives':
        p = two_positives(bound)
        return p <= 1 / bound.n, p <= 0.1
    test = flow_null if null == 'other answers, flow' else attribution_null
    found = test(bound, n_perm=5000, seed=seed)
    return found.q <= 0.05, found.p <= 0.1


def large_heads(bound):
    "Return which heads have at least 1 % of the summed sizes of all attributions; all if there is nothing to attribute."
    try:
        size = np.abs(attribute_heads(bound, **ranking_settings(bound)).by_pair.sum(0))
    except InputError:
        return True
    return size > size.sum() / 100


def run(case, family, seed, nulls, device='cpu'):
    "Return one row for each null."
    planted = plant(family, seed=300 + seed, n=3 * N_PAIRS)
    planted.model.original_model.to(device)
    task = random_answers(planted.task, seed) if case == 'random answers' else planted.task
    if case == 'cut':
        cut_out(planted)
    bound = bind_task(planted.model, task)
    bound = bound.take(min(N_PAIRS, bound.n))
    cfg = planted.model.cfg
    true = np.array([(layer, head) in planted.truth for layer in range(cfg.n_layers) for head in range(cfg.n_heads)])
    large = large_heads(bound)
    about = dict(case=case, family=family, seed=seed, pairs=bound.n)
    rows = []
    for null in nulls:
        named, small = named_by(null, bound, seed)
        rows.append(
            about
            | dict(null=null, planted_named=named[true].mean(), others_named=int(named[~true].sum()))
            | dict(others_large=int((named & large)[~true].sum()), p_below_10=small[~true].mean())
        )
    return rows


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('out', type=Path)
    parser.add_argument('--seeds', nargs='+', type=int, default=list(range(20)))
    parser.add_argument('--families', nargs='+', default=list(PLANTS))
    parser.add_argument('--nulls', nargs='+', default=NULLS)
    parser.add_argument('--device', default='cpu', help="'cpu', the default, or 'cuda'; the models are tiny")
    given = parser.parse_args()
    rows = pd.read_csv(given.out).to_dict('records') if given.out.is_file() else []
    done = {(row['case'], row['family'], row['seed'], row['null']) for row in rows}
    for seed, family, case in itertools.product(given.seeds, given.families, CASES):
        nulls = [null for null in given.nulls if (case, family, seed, null) not in done]
        if nulls:
            rows += run(case, family, seed, nulls, given.device)
            with whole_file(given.out) as path:
                pd.DataFrame(rows).to_csv(path, index=False)
