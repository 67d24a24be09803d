"""Measure how much of SmolLM2-135M's prediction sparse dictionaries of one layer's attention output keep, beside PCA.

    python nbs/benchmarks/features/frontier.py        # writes frontier.csv; about ten minutes of one core

1. Text: the topics of Python's `help` in documents of 64 tokens. Whole topics are held out.
2. Train dictionaries of several sparsities on the rest; fit PCA and random directions with as many components.
3. On the held-out documents, put each reconstruction in the place of the activation. 'mean' puts the mean there: what a
   dictionary must beat.
"""

import argparse
import csv
import time
from pathlib import Path

import numpy as np
import torch

from circuit_sae.features.dictionary import Basis, fit_basis
from circuit_sae.features.token_acts import installed_prose, text_documents, token_acts
from circuit_sae.features.training import evaluate_dictionaries, train_dictionary
from circuit_sae.models.load import load_model

HERE = Path(__file__).resolve().parent
COMPONENTS = [8, 16, 32, 64]


def spread(documents, n):
    "Return `n` documents, evenly spaced."
    return documents.take(np.linspace(0, len(documents) - 1, n).astype(int))


def mean_alone(basis):
    "Return a basis of one component that is always zero, so that the reconstruction is the mean."
    place = dict(site=basis.site, model=basis.model)
    return Basis('pca', torch.zeros(basis.d_in, 1), basis.directions[:1], basis.mean, **place)


def dictionaries(acts, args):
    "Yield (name, size, dictionary) of everything that is compared."
    for kind, k in [('topk', 8), ('topk', 16), ('topk', 32), ('batchtopk', 32)]:
        start = time.time()
        settings = dict(width=args.width, k=k, steps=args.steps, batch=512, seed=args.seed)
        checkpoint = args.folder and args.folder / f'{kind}{k}.pt'
        yield kind, k, train_dictionary(acts, kind, **settings, checkpoint=checkpoint, device=args.device)
        print(f'{kind} {k}: {time.time() - start:.0f} s', flush=True)
    pca = fit_basis(acts, 'pca')
    yield 'mean', 0, mean_alone(pca)
    for n in COMPONENTS:
        yield 'pca', n, fit_basis(acts, 'pca', n)
    yield 'random', 32, fit_basis(acts, 'random', 32, args.seed)


def main():
    "Train, measure, and write the table."
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--site', default='L1.attn_out')
    parser.add_argument('--device', help="where the model runs, such as 'cuda'; default: a GPU if there is one")
    parser.add_argument('--width', type=int, default=2304)
    parser.add_argument('--steps', type=int, default=800)
    parser.add_argument('--documents', type=int, default=700)
    parser.add_argument('--held_out', type=int, default=30)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--folder', type=Path, help='where to keep checkpoints')
    parser.add_argument('--out', type=Path, default=HERE / 'frontier.csv')
    args = parser.parse_args()
    model = load_model('smollm2-135m', args.device)
    text = text_documents(model, installed_prose(), context=64, name="topics of Python's help")
    train, held_out = text.split(0.1, args.seed)
    train, held_out = spread(train, args.documents), spread(held_out, args.held_out)
    start = time.time()
    acts = token_acts(model, train, args.site)
    print(f'{acts}: {time.time() - start:.0f} s', flush=True)
    compared = list(dictionaries(acts, args))
    scores = evaluate_dictionaries(model, [d for *_, d in compared], held_out)
    rows = []
    for (kind, size, d), s in zip(compared, scores):
        figures = {name: round(v, 4) if isinstance(v, float) else v for name, v in s.to_dict().items()}
        rows.append(dict(site=args.site, kind=kind, size=size, width=d.width) | figures | dict(train_tokens=len(acts)))
        if kind == 'mean':
            rows[-1]['l0'] = 0.0
        print(kind, size, s, flush=True)
    with open(args.out, 'w', newline='') as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == '__main__':
    main()
