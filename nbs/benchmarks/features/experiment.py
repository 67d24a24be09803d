"""Measure how few features, and how small an edit, turn one prompt's prediction into the other's.

python nbs/benchmarks/features/experiment.py --model smollm2-135m --task ioi
python nbs/benchmarks/features/experiment.py --task ioi --parts heads agreement
python nbs/benchmarks/features/experiment.py --model gemma3-270m --task greater_than --device cuda --out results

The defaults are sizes for two cores; with `--parts curves` they take about ten minutes. Larger ones:
--pairs 12 --width 1152 --steps 400 --prompts 150 --prose 200 --taus .001 .003 .01 .03 .1 --seeds 0 1.

Results go to <task>.csv, <task>_heads.csv and <task>_agreement.csv beside this file or in the folder of `--out`, for
other models than SmolLM2-135M with the name of the model in front. Trained dictionaries are cached.
"""

import argparse
import itertools
from pathlib import Path

import pandas as pd

from circuit_sae.bench.feature_experiment import (
    FEATURE_CHOICES,
    DICTIONARIES,
    NODES,
    NodePasses,
    attribution_agreement,
    as_table,
    effect_shares,
    make_dictionary,
    measure_dictionary,
    same_length,
    strongest_heads,
    training_text,
)
from circuit_sae.core import cache_dir
from circuit_sae.data.batches import bind_task, pair_batches
from circuit_sae.data.prompts import TASKS, get_task
from circuit_sae.features.patching import FeaturePasses
from circuit_sae.features.sites import Site
from circuit_sae.features.token_acts import token_acts
from circuit_sae.models.forward import input_device
from circuit_sae.models.load import load_model

HERE = Path(__file__).resolve().parent
CACHE = cache_dir() / 'features'
HEAD_DICTIONARIES = ['TopK, k = 8', 'PCA', 'random directions', 'coordinates']


def table_path(given, suffix=''):
    "Return the path of a table of this run."
    model = '' if given.model == 'smollm2-135m' else f'{Path(given.model).name}_'
    given.out.mkdir(parents=True, exist_ok=True)
    return given.out / f'{model}{given.task}{suffix}.csv'


def make(acts, name, width, steps, given):
    "Return a dictionary, trained where the model runs."
    return make_dictionary(acts, name, width, steps, folder=CACHE, device=given.device)


def measure_curves(bound, acts, given):
    "Write the table of the published experiment, one dictionary after the other."
    pairs = same_length(bound, given.pairs)
    batch = pair_batches(pairs, given.pairs, pad=False)[0]
    rows = {}
    for name in [*given.dictionaries, NODES]:
        if name == NODES:
            passes = NodePasses(pairs, batch, acts.site.layer)
        else:
            dictionary = make(acts, name, given.width, given.steps, given)
            passes = FeaturePasses(pairs, batch, [dictionary])
        rows[name] = measure_dictionary(passes, batch, given.taus, given.seeds)
        print(name, len(rows[name]), 'rows', flush=True)
        as_table(rows).to_csv(table_path(given), index=False, float_format='%.5g')


def measure_heads(bound, given):
    "Write which fraction of the effects of the strongest heads few features explain."
    pairs = same_length(bound, given.head_pairs)
    heads = strongest_heads(pairs, given.heads)
    text = training_text(bound.model, given.task, given.head_prompts, given.head_prose)
    rows = []
    for site, acts in token_acts(bound.model, text, [Site('z', *head) for head in heads]).items():
        made = {name: make(acts, name, given.head_width, given.head_steps, given) for name in HEAD_DICTIONARIES}
        for name, choice in itertools.product(made, FEATURE_CHOICES):
            for row in effect_shares(pairs, made[name], made['coordinates'], choice=choice):
                rows.append((f'L{site.layer}H{site.head}', name, choice, *row))
            print(site, rows[-1], flush=True)
        columns = ['head', 'dictionary', 'choice', 'n', 'share', 'se']
        pd.DataFrame(rows, columns=columns).to_csv(table_path(given, '_heads'), index=False, float_format='%.5g')


def measure_agreement(bound, acts, names, width, given):
    "Write the rank correlation of every estimate with measured effects."
    pairs = same_length(bound, given.pairs)
    path = table_path(given, '_agreement')
    columns = ['site', 'dictionary', 'metric', 'method', 'features', 'spearman']
    found = pd.read_csv(path).values.tolist() if path.is_file() else []
    found = [row for row in found if row[0] != str(acts.site)]
    for name in names:
        dictionary = make(acts, name, width, given.steps, given)
        for row in attribution_agreement(pairs, dictionary):
            found.append((str(acts.site), name, *row))
            print(found[-1], flush=True)
        pd.DataFrame(found, columns=columns).to_csv(path, index=False, float_format='%.4g')


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--model', default='smollm2-135m')
    parser.add_argument('--task', default='ioi', choices=list(TASKS))
    parser.add_argument('--device', help="where the model runs, such as 'cuda'; default: a GPU if there is one")
    parser.add_argument('--out', type=Path, default=HERE, help='folder of the tables')
    parser.add_argument('--layer', type=int, help='patch the residual stream before it; default: after two thirds')
    parser.add_argument('--pairs', type=int, default=8)
    parser.add_argument('--head_pairs', type=int, default=24)
    parser.add_argument('--heads', type=int, default=4)
    parser.add_argument('--width', type=int, default=576)
    parser.add_argument('--head_width', type=int, default=256)
    parser.add_argument('--head_steps', type=int, default=800)
    parser.add_argument('--head_prompts', type=int, default=400, help='pairs in the training text of heads')
    parser.add_argument('--head_prose', type=int, default=0, help='pieces of prose in the training text of heads')
    parser.add_argument('--steps', type=int, default=150)
    parser.add_argument('--prompts', type=int, default=40, help='pairs of the task in the training text')
    parser.add_argument('--prose', type=int, default=20, help='pieces of prose in the training text')
    parser.add_argument('--taus', nargs='*', type=float, default=[0.01])
    parser.add_argument('--seeds', nargs='+', type=int, default=[0])
    parser.add_argument('--dictionaries', nargs='+', default=[name for name in DICTIONARIES if name != 'TopK, k = 8'])
    parser.add_argument('--parts', nargs='+', default=['curves', 'heads', 'agreement'])
    given = parser.parse_args()
    model = load_model(given.model, given.device)
    given.device = str(input_device(model))
    given.layer = 2 * model.cfg.n_layers // 3 if given.layer is None else given.layer
    bound = bind_task(model, get_task(given.task, n=100))
    if 'heads' in given.parts:
        measure_heads(bound, given)
    if {'curves', 'agreement'} & set(given.parts):
        text = training_text(model, given.task, given.prompts, given.prose)
    if 'agreement' in given.parts:
        head = strongest_heads(same_length(bound, given.pairs), 1)[0]
        measure_agreement(
            bound, token_acts(model, text, Site('z', *head)), HEAD_DICTIONARIES[:2], given.head_width, given
        )
    if {'curves', 'agreement'} & set(given.parts):
        acts = token_acts(model, text, Site('resid_pre', given.layer))
        print(acts, flush=True)
    if 'agreement' in given.parts:
        measure_agreement(bound, acts, ['α = 1e-3', 'PCA'], given.width, given)
    if 'curves' in given.parts:
        measure_curves(bound, acts, given)
