"""Measure what carries the effects of the strongest heads: other heads, MLPs, or the residual stream alone.

python nbs/benchmarks/edges/carriers.py nbs/benchmarks/edges/carriers.csv

Each head is patched on its own, three times: everything later is recomputed; the later heads keep their clean `z`; the
later MLPs keep their clean output, too. An effect that stays if the later heads are clean is carried by no edge between
heads.
"""

import argparse
from pathlib import Path

import pandas as pd
import torch

from circuit_sae.causal.patching import HeadEffects
from circuit_sae.core import whole_file
from circuit_sae.data.batches import bind_task, pair_batches
from circuit_sae.data.prompts import get_task
from circuit_sae.models.behaviour import get_metric
from circuit_sae.models.forward import forward, hooked, last_logits
from circuit_sae.models.load import load_model
from circuit_sae.models.rerun import collect_z, edit_hook
from circuit_sae.truth.references import effects_file

N_HEADS, N_PAIRS, SEED = 8, 12, 1000
TASKS = ['ioi', 'induction', 'greater_than']
CLEAN = {'nothing': (), 'later heads': ('z',), 'later heads and MLPs': ('z', 'mlp')}


def mlp_hooks(model, function):
    "Return hooks that call `function(layer, x)` on the output of every MLP."
    names = [f'blocks.{layer}.hook_mlp_out' for layer in range(model.cfg.n_layers)]
    return [(name, lambda x, hook, layer=layer: function(layer, x)) for layer, name in enumerate(names)]


def patched_logits(model, ids, z, mlp, head, clean):
    "Return the logits if `head` has its `z` of the negatives, z[1], and some later parts their clean values."

    def edit_z(layer, x):
        if layer == head.layer:
            x = x.clone()
            x[:, :, head.head] = z[1][layer][:, :, head.head]
        elif layer > head.layer and 'z' in clean:
            x = z[0][layer]
        return x

    def edit_mlp(layer, x):
        return mlp[layer] if layer >= head.layer and 'mlp' in clean else x

    layers = range(model.cfg.n_layers)
    hooks = [edit_hook(model, layer, lambda x, layer=layer: edit_z(layer, x)) for layer in layers]
    with hooked(model, hooks + mlp_hooks(model, edit_mlp)):
        return last_logits(forward(model, ids), None)


@torch.no_grad()
def measure(bound, heads):
    "Return {(head, what is clean): effect, a fraction of the metric's difference}."
    metric, falls, gap = get_metric('logit_diff'), {}, 0.0
    for batch in pair_batches(bound, 24, pad=False):
        mlp = {}
        with hooked(bound.model, mlp_hooks(bound.model, lambda layer, x: mlp.update({layer: x.clone()}))):
            logits, z_clean = collect_z(bound.model, batch.positives)
        corrupted, z_corrupted = collect_z(bound.model, batch.negatives)
        z, value = (z_clean, z_corrupted), bound.measure(metric, logits, batch.pairs)
        gap += (value - bound.measure(metric, corrupted, batch.pairs)).sum().item()
        for head in heads:
            for name, clean in CLEAN.items():
                logits = patched_logits(bound.model, batch.positives, z, mlp, head, clean)
                fall = (value - bound.measure(metric, logits, batch.pairs)).sum().item()
                falls[head, name] = falls.get((head, name), 0.0) + fall
    return {key: fall / gap for key, fall in falls.items()}


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('out', type=Path)
    parser.add_argument('--models', nargs='+', default=['smollm2-135m', 'gemma3-270m'])
    given = parser.parse_args()
    rows = []
    for name in given.models:
        model = load_model(name)
        for task in TASKS:
            heads = [h for h, _ in HeadEffects.load(effects_file(task, name)).ranked(N_HEADS)]
            found = measure(bind_task(model, get_task(task, n=N_PAIRS, seed=SEED)), heads)
            cells = [dict(model=name, task=task, head=str(h), clean=c, effect=x) for (h, c), x in found.items()]
            rows += cells
            print(pd.DataFrame(cells).pivot(index='head', columns='clean', values='effect'), flush=True)
    with whole_file(given.out) as path:
        pd.DataFrame(rows).to_csv(path, index=False, float_format='%.5f')
