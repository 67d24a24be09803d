"""Measure what the page checks/transfer shows; every step keeps what its table has already.

    python nbs/checks/transfer/make.py behaviour truth scores    both real models (about an hour of one core)
    python nbs/checks/transfer/make.py codes planted             the autoencoders (two minutes)

`scores` continues cell by cell. To measure one method again, give --again 'difference flow'.
"""

import argparse
import itertools
import os
import random
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import save_file

from circuit_sae.bench.meaning import code_information
from circuit_sae.bench.scorers import class_difference
from circuit_sae.causal.patching import patch_heads
from circuit_sae.codes.activations import cache_head_acts
from circuit_sae.codes.health import code_agreement
from circuit_sae.codes.sae import DiscreteSAE
from circuit_sae.codes.train import train_sae
from circuit_sae.data.batches import bind_task
from circuit_sae.data.prompts import get_task, induction_task, ioi_task
from circuit_sae.data.readers import read_examples
from circuit_sae.data.tasks import Task
from circuit_sae.find import preset_settings
from circuit_sae.models.behaviour import check_behaviour
from circuit_sae.models.load import load_model
from circuit_sae.score.attribution import attribute_heads
from circuit_sae.score.flow import difference_flow
from circuit_sae.score.unique_codes import node_scores
from circuit_sae.truth.evaluate import average_precision, roc_auc
from circuit_sae.truth.planted import PLANTS, plant

HERE = Path(__file__).resolve().parent
FRESH_FOLDER = HERE.parent / 'fresh'
EFFECTS = HERE.parents[2] / 'circuit_sae' / 'assets' / 'effects'
MODELS = ['smollm2-135m', 'gemma3-270m']
BUILT_IN = ['ioi', 'greater_than', 'docstring', 'induction']
FRESH = ['agreement', 'capitals', 'languages', 'pronouns', 'succession', 'opposites', 'plurals']
N_PAIRS, DRAWS = 20, 3
KINDS = ['own', 'own, other prompts', 'another model', 'untrained']  # autoencoders of the planted models
loaded = cache(load_model)


def judged_pairs(task):
    "Return the pairs on which a model is judged: 40 of a built-in task, or all 120 of a file."
    return get_task(task, n=40, seed=1000) if task in BUILT_IN else Task.from_file(FRESH_FOLDER / f'{task}.csv')


def patched_pairs(task):
    "Return the pairs of the ground truth: 40 of a built-in task, or the 16 of a file."
    return judged_pairs(task) if task in BUILT_IN else Task.from_file(FRESH_FOLDER / f'truth/{task}.csv')


def scored_pairs(task, draw):
    "Return the pairs of one draw of a task."
    if task in BUILT_IN:
        return get_task(task, n=N_PAIRS, seed=draw)
    pairs = random.Random(draw).sample(read_examples(FRESH_FOLDER / f'{task}.csv'), N_PAIRS)
    return Task.from_data(pairs, task, seed=draw)


def save_table(table, path):
    "Write a table, whole or not at all."
    table.to_parquet(path.with_suffix('.new'), index=False)
    os.replace(path.with_suffix('.new'), path)


def measure_behaviour(models, tasks):
    "Measure how well the models do the tasks, one row a prompt."
    path = HERE / 'behaviour.parquet'
    done = pd.read_parquet(path) if path.exists() else pd.DataFrame(columns=['model', 'task'])
    for model, task in itertools.product(models, tasks):
        if not ((done.model == model) & (done.task == task)).any():
            b = check_behaviour(loaded(model), judged_pairs(task), batch_size=20)
            columns = dict(model=model, task=task, positive=b.is_positive, logit_diff=b.logit_diff, ok=b.ok)
            done = pd.concat([done, pd.DataFrame(columns)], ignore_index=True)
            save_table(done, path)


def measure_truth(models, tasks):
    "Patch every head of Gemma; the effects of SmolLM2 were measured before."
    for model, task in itertools.product(models, tasks):
        if model != 'smollm2-135m':
            out = EFFECTS / model / f'{task}-resample.safetensors'
            patch_heads(loaded(model), patched_pairs(task), out=out, batch_size=16)


def score_atp(bound):
    "Return attribution patching with answers."
    return attribute_heads(bound, batch_size=10)


def score_means(bound):
    "Return the norm of the difference of the class means of each head."
    return class_difference(cache_head_acts(bound, batch_size=10))


METHODS = {'attribution patching': score_atp, 'difference flow': difference_flow, 'mean difference': score_means}


def measure_scores(models, tasks, again=()):
    "Score the heads of the models on every draw of the tasks, one table a model."
    for model in models:
        path = HERE / f'{model}.parquet'
        done = pd.read_parquet(path) if path.exists() else pd.DataFrame(columns=['task', 'draw', 'method', 'scores'])
        done = done[~done.method.isin(again)]
        for method, draw, task in itertools.product(METHODS, range(DRAWS), tasks):
            if not ((done.method == method) & (done.draw == draw) & (done.task == task)).any():
                scores = METHODS[method](bind_task(loaded(model), scored_pairs(task, draw)))
                row = dict(task=task, draw=draw, method=method, scores=np.float32(scores.values))
                done = pd.concat([done, pd.DataFrame([row])], ignore_index=True)
                save_table(done, path)


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
    parser.add_argument('steps', nargs='+', choices=['behaviour', 'truth', 'scores', 'codes', 'planted'])
    parser.add_argument('--models', nargs='+', default=MODELS)
    parser.add_argument('--tasks', nargs='+', default=BUILT_IN + FRESH)
    parser.add_argument('--again', nargs='+', default=[], help='methods to score again')
    given = parser.parse_args()
    for step in given.steps:
        if step == 'scores':
            measure_scores(given.models, given.tasks, given.again)
        elif step in ('behaviour', 'truth'):
            dict(behaviour=measure_behaviour, truth=measure_truth)[step](given.models, given.tasks)
        else:
            dict(codes=measure_codes, planted=measure_planted)[step]()
