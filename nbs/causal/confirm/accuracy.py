"""Judge `confirm_heads` by the effects of all heads that come with the package: `python accuracy.py accuracy.csv`.

Of the 40 pairs of a task, 24 drawn at random are for the confirmation, and the effects on the other 16 are the truth.
The score is attribution patching on 10 pairs of another seed. `exhaustive` is the choice by the effects of all heads on
all 24 pairs.
"""

import sys

import numpy as np
import pandas as pd

from circuit_sae.causal.confirm import Confirmation, ConfirmSettings, pair_blocks, run_stages
from circuit_sae.causal.patching import HeadEffects, new_effects
from circuit_sae.data.batches import bind_task
from circuit_sae.data.prompts import TASKS, get_task
from circuit_sae.models.load import load_model
from circuit_sae.score.attribution import attribute_heads
from circuit_sae.truth.evaluate import average_precision
from circuit_sae.truth.references import effects_file

N_CONFIRM = 24


class Known:
    "Give the patcher of `run_stages` effects that are known already."

    def __init__(self, effects, known):
        self.effects = effects
        self.known = known
        self.passes = {}

    def measure_clean(self, block):
        self.passes[block[0]] = block
        self.effects.clean[block] = self.known.clean[block]
        self.effects.corrupted[block] = self.known.corrupted[block]

    def patch_pairs(self, blocks, heads):
        for block in blocks:
            self.effects.patched[np.ix_(block, heads)] = self.known.patched[np.ix_(block, heads)]


def drawn(known, pairs):
    "Return the effects on these pairs."
    return HeadEffects(known.patched[pairs], known.clean[pairs], known.corrupted[pairs], known.made_from)


def f1(chosen, true):
    "Return the harmonic mean of precision and recall."
    return 2 * (chosen & true).sum() / max(1, chosen.sum() + true.sum())


def judge(known, screen, seed):
    "Return the figures of one draw of the pairs."
    order = np.random.default_rng(seed).permutation(len(known.clean))
    first, second = drawn(known, order[:N_CONFIRM]), drawn(known, order[N_CONFIRM:])
    settings = ConfirmSettings(n_pairs=N_CONFIRM, metric='logit_diff', seed=seed)
    effects = new_effects(known.made_from | dict(n_pairs=N_CONFIRM))
    stages = run_stages(effects, screen, pair_blocks(range(N_CONFIRM)), Known(effects, first), settings)
    found = Confirmation(effects, screen, stages[0], np.full(len(screen), np.nan), settings, False, stages[2])
    true = second.values >= settings.min_effect
    return dict(
        f1=f1(found.chosen, true),
        f1_exhaustive=f1(first.values >= settings.min_effect, true),
        ap=average_precision(found.values, true),
        ap_exhaustive=average_precision(first.values, true),
        ap_screen=average_precision(screen.values, true),
        patched=int(found.patched.sum()),
        runs=int(np.isfinite(effects.patched).sum()),
        chosen=int(found.chosen.sum()),
        true=int(true.sum()),
    )


if __name__ == '__main__':
    model = load_model('smollm2-135m')
    rows = []
    for name in TASKS:
        known = HeadEffects.load(effects_file(name))
        screens = [attribute_heads(bind_task(model, get_task(name, n=10, seed=seed))) for seed in range(2)]
        for seed in range(20):
            rows.append(dict(task=name, seed=seed) | judge(known, screens[seed % 2], seed))
        pd.DataFrame(rows).round(4).to_csv(sys.argv[1], index=False)
        print(pd.DataFrame(rows).groupby('task').mean().round(3).to_string(), flush=True)
