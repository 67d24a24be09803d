"""Measure the rows of the speed page that need a GPU, on random models of two shapes, without any download.

    python nbs/benchmarks/speed/gpu.py            # writes gpu-135m.json and gpu-8b.json beside this file
    python nbs/benchmarks/speed/gpu.py 135m       # one shape
    python nbs/benchmarks/speed/gpu.py tiny       # a small shape that any machine can run, to try the script

Launches, synchronisations and seconds of a pass do not depend on the values of the weights. Confirmation does: it stops
where a model has no behaviour. So the answer of each pair is the token that the random model itself prefers most on the
positive, compared with the negative.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from circuit_sae.bench.speed import speed
from circuit_sae.causal.patching import patch_heads
from circuit_sae.codes.activations import cache_head_acts
from circuit_sae.codes.train import train_sae
from circuit_sae.core import all_heads, save_json
from circuit_sae.data.batches import bind_task, pair_batches
from circuit_sae.data.prompts import get_task, tiny_tokenizer
from circuit_sae.models.forward import run
from circuit_sae.models.load import load_model
from circuit_sae.score.attribution import attribute_heads
from circuit_sae.score.flow import difference_flow

SHAPES = {  # d_model, d_mlp, layers, heads, heads with a key and a value of their own, dtype, pairs
    '135m': (576, 1536, 30, 9, 3, 'float32', 250),
    '8b': (4096, 14336, 32, 32, 8, 'bfloat16', 100),
    'tiny': (48, 96, 4, 4, 2, 'float32', 8),
}
STAGES = ['find, confirmed', 'patching', 'activations']
STAGES += ['work: activations', 'work: training', 'work: flow', 'work: patching', 'work: find']
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


def save_model(name, folder):
    "Save a random model of a shape."
    d_model, d_mlp, layers, heads, groups, dtype, _ = SHAPES[name]
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=d_model,
        intermediate_size=d_mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=512,
    )
    with torch.device(DEVICE):  # random numbers are much faster on the card
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_task(name, folder, path):
    "Save the prompts of IOI with the answers that the model prefers."
    dtype, n_pairs = SHAPES[name][-2:]
    bound = bind_task(load_model(folder, DEVICE, dtype=dtype), get_task('ioi', n=n_pairs))
    rows = [None] * bound.n
    for batch in pair_batches(bound):
        ids = zip((batch.positives, batch.negatives), batch.lengths)
        positive, negative = (run(bound.model, x, lengths=lengths) for x, lengths in ids)
        change = positive - negative
        for pair, answer, wrong in zip(batch.pairs, change.argmax(-1).tolist(), change.argmin(-1).tolist()):
            texts = bound.tokens.texts[pair], bound.tokens.texts[pair + bound.n]
            rows[pair] = dict(positive=texts[0], negative=texts[1], answer=answer, wrong=wrong)
    save_json(path, rows)


def results(folder, device):
    "Return what the stages compute on a few pairs, as arrays."
    bound = bind_task(load_model(folder, device, dtype='float32'), get_task(f'{folder}/task.json', n=8))
    acts = cache_head_acts(bound)
    heads = all_heads(acts.n_layers, acts.n_heads)[:: max(1, acts.n_layers // 4)]
    return dict(
        activations=acts.z.cpu().numpy(),
        flow=difference_flow(bound, edges=True).by_pair,
        attribution=attribute_heads(bound).by_pair,
        patching=patch_heads(bound, heads=heads).patched,
        training=np.array(train_sae(acts, n_warm=20, n_epochs=60).losses),
    )


def agreement(folder):
    "Return the largest difference between GPU and CPU of each stage, as a fraction of the largest value on the CPU."
    there, here = results(folder, DEVICE), results(folder, 'cpu')
    return {k: float(np.nanmax(np.abs(there[k] - x)) / np.nanmax(np.abs(x))) for k, x in here.items()}


def measure(name):
    "Measure one shape and write its table."
    dtype, n_pairs = SHAPES[name][-2:]
    out = Path(__file__).with_name(f'gpu-{name}.json')
    with tempfile.TemporaryDirectory() as folder:
        save_model(name, folder)
        save_task(name, folder, f'{folder}/task.json')
        table = speed(folder, f'{folder}/task.json', n_pairs, STAGES, out, repeats=2, device=DEVICE, dtype=dtype)
        if dtype == 'float32':
            table.settings['agreement'] = agreement(folder)
    table.settings |= dict(model=f'random, {name} shape, {dtype}', task='ioi, answers chosen by the model')
    table.save(out)
    print(table)
    print('largest difference between GPU and CPU, relative:', table.settings.get('agreement'))


if __name__ == '__main__':
    for shape in sys.argv[1:] or ['135m', '8b']:
        measure(shape)
