"""Measure what the page checks/transfer shows; every step keeps what its table has already.

    python nbs/checks/transfer/make.py truth scores     both real models (about half an hour of one core)
    python nbs/checks/transfer/make.py codes planted    the autoencoders (two minutes)

`scores` adds to the cells of benchmarks/rivals the same methods on Gemma and induction.
"""

import argparse
import itertools
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import save_file

from circuit_sae.bench.meaning import code_information
from circuit_sae.bench.rivals import score_cell
from circuit_sae.bench.scorers import class_difference
from circuit_sae.causal.patching import patch_heads
from circuit_sae.codes.activations import cache_head_acts
from circuit_sae.codes.health import code_agreement
from circuit_sae.codes.sae import DiscreteSAE
from circuit_sae.codes.train import train_sae
from circuit_sae.data.batches import bind_task
from circuit_sae.data.prompts import get_task, induction_task, ioi_task
from circuit_sae.data.tasks import Task
from circuit_sae.find import preset_settings
from circuit_sae.models.load import load_model
from circuit_sae.score.unique_codes import node_scores
from circuit_sae.truth.evaluate import average_precision, roc_auc
from circuit_sae.truth.planted import PLANTS, plant

HERE = Path(__file__).resolve().parent
FRESH_FOLDER = HERE.parent / 'fresh'
EFFECTS = HERE.parents[2] / 'circuit_sae' / 'assets' / 'effects'
BUILT_IN = ['ioi', 'greater_than', 'docstring', 'induction']
FRESH = ['agreement', 'capitals']  # the fresh tasks on which the heads of both models were patched
N_PAIRS, DRAWS = 20, 3
KINDS = ['own', 'own, other prompts', 'another model', 'untrained']  # autoencoders of the planted models
loaded = lru_cache(maxsize=1)(load_model)  # one model at a time, which saves memory


def patched_pairs(task):
    "Return the pairs of the ground truth: 40 of a built-in task, or the 16 of a file."
    if task in BUILT_IN:
        return get_task(task, n=40, seed=1000)
    return Task.from_file(FRESH_FOLDER / f'truth/{task}.csv')


def measure_truth():
    "Patch every head of Gemma; the effects of SmolLM2 were measured before."
    for task in BUILT_IN + FRESH:
        folder = EFFECTS if task in BUILT_IN else FRESH_FOLDER / 'truth'
        name = f'{task}-resample' if task in BUILT_IN else task
        out = folder / 'gemma3-270m' / f'{name}.safetensors'
        patch_heads(loaded('gemma3-270m'), patched_pairs(task), out=out, batch_size=16)


def measure_rivals():
    "Score the heads of Gemma on induction by the methods of the table of rivals."
    for draw, group in itertools.product(range(DRAWS), ('flow', 'proposed')):
        bound = bind_task(loaded('gemma3-270m'), get_task('induction', n=N_PAIRS, seed=draw))
        score_cell(bound, HERE / 'cells', draw, group)


def train_all(acts):
    "Return five autoencoders: the task's own, and others that differ in seed, prompts, task or training."

    def train(name, seed):
        return train_sae(acts[name], **preset_settings('quick', n_examples=5, seed=seed))

    return {
        'own': train('draw 0', seed=0),
        'another seed': train('draw 0', seed=1),
        'other prompts': train('draw 1', seed=2),
        'another task': train('induction', seed=3),
        'untrained': DiscreteSAE(acts['draw 0'].d_model, seed=4),
    }


def name_attributes(task):
    "Return two attributes of each pair of the IOI task: the giver, and whether the answer comes first."
    giver = [e.wrong[0] for e in task.examples]
    order = [e.positive.index(e.answer[0].strip()) < e.positive.index(e.wrong[0].strip()) for e in task.examples]
    return {'giver': giver, 'order': order}


def information(codes, acts):
    "Return [z, p_max] of the information of some codes on each attribute."
    found = {}
    for attribute, values in name_attributes(ioi_task(n=60, seed=0)).items():
        info = code_information(codes, values, acts.is_positive, attribute)
        found[attribute] = np.stack([info.z, info.p_max])
    return found


def measure_codes():
    "Measure scores, agreement and information of five autoencoders of SmolLM2, one array of heads each."
    draws = {f'draw {seed}': ioi_task(n=60, seed=seed) for seed in (0, 1)}
    tasks = draws | {'induction': induction_task(n=10, seed=0)}
    acts = {name: cache_head_acts(loaded('smollm2-135m'), task) for name, task in tasks.items()}
    saes = train_all(acts)
    codes = {name: sae.codes(acts['draw 0']) for name, sae in saes.items()}
    arrays = {}
    for name, c in codes.items():
        arrays[f'score/{name}'] = node_scores(c, acts['draw 0'].is_positive).values
        arrays[f'agreement/{name}'] = code_agreement(codes['own'], c)
        arrays |= {f'{attribute}/{name}': found for attribute, found in information(c, acts['draw 0']).items()}
    for name in ('own', 'other prompts'):
        arrays[f'draw 1/{name}'] = node_scores(saes[name].codes(acts['draw 1']), acts['draw 1'].is_positive).values
    for name in draws:
        arrays[f'means/{name}'] = class_difference(acts[name]).values
    save_file({k: np.ascontiguousarray(v, np.float64) for k, v in arrays.items()}, HERE / 'codes.safetensors')


def role_ranks(scores, truth):
    "Return, for every role, the fraction of heads that its heads score above; ties count half."
    values = scores.values
    ranks = {}
    for role, heads in truth.roles.items():
        ranks[role] = np.mean([(values < scores[h]).mean() + (values == scores[h]).mean() / 2 for h in heads])
    return ranks


def planted_rows(family):
    "Yield the figures of every planted model of a family with each autoencoder."
    plants = [plant(family, seed=seed, n=50, copies=2) for seed in range(3)]
    cached = [cache_head_acts(p.model, p.task) for p in plants]
    fits = [train_sae(acts, n_examples=5, d_sae=100, seed=i) for i, acts in enumerate(cached)]
    for i, (p, acts) in enumerate(zip(plants, cached)):
        more = cache_head_acts(p.model, Task('other prompts', PLANTS[family].pairs, n=50, seed=100))
        untrained = DiscreteSAE(acts.d_model, 100, seed=10 + i)
        settings = zip(KINDS, [fits[i], fits[i], fits[(i + 1) % 3], untrained], [acts, more, acts, acts])
        for kind, sae, data in settings:
            scores = node_scores(sae.codes(data), data.is_positive)
            figures = dict(auc=roc_auc(scores, p.truth), ap=average_precision(scores, p.truth))
            for name, value in (figures | role_ranks(scores, p.truth)).items():
                yield dict(family=family, model=i, autoencoder=kind, figure=name, value=value)


def measure_planted():
    "Measure the transfer of autoencoders between planted models, one row a figure."
    pd.DataFrame([row for family in PLANTS for row in planted_rows(family)]).to_csv(HERE / 'planted.csv', index=False)


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('steps', nargs='+', choices=['truth', 'scores', 'codes', 'planted'])
    steps = parser.parse_args().steps
    if 'truth' in steps:
        measure_truth()
    if 'scores' in steps:
        measure_rivals()
    if 'codes' in steps:
        measure_codes()
    if 'planted' in steps:
        measure_planted()
