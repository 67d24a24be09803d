"""Score how well simple explanations predict features of a real model.

python nbs/benchmarks/features/interpretability.py
python nbs/benchmarks/features/interpretability.py 'L5 attn_out' --model gemma3-270m --device cuda --out results

1. Cut prose of installed packages into documents of 64 tokens; a quarter of the texts is held out.
2. At each site, train a TopK dictionary and fit PCA, ICA, random directions and neurons on the other texts.
3. Score 100 features of each, with activations below zero counted as zero and as they are.

The results of all sites are in `interpretability.csv` beside this file or in the folder of `--out`, one row a feature;
for other models than SmolLM2-135M the name of the model stands in front. A site that is there already is skipped.
"""

import argparse
from pathlib import Path

import pandas as pd

from circuit_sae.core import whole_file
from circuit_sae.features.dictionary import fit_basis
from circuit_sae.features.interpretability import compare_interpretability
from circuit_sae.features.token_acts import installed_prose, text_documents, token_acts
from circuit_sae.features.training import fit_figures, train_dictionary
from circuit_sae.models.forward import input_device
from circuit_sae.models.load import load_model

HERE = Path(__file__).parent
SITES = ['L2 resid_post', 'L5 attn_out']
WIDTH = 1152  # features of the dictionary: twice the width of the residual stream
K = 24  # active features at a token
N_DOCUMENTS = 400


def documents(model):
    "Return documents for training and held-out documents."
    texts = installed_prose('python', 'numpy', max_chars=600 * N_DOCUMENTS)
    return text_documents(model, texts, context=64, skip_short=True, max_documents=N_DOCUMENTS).split(0.25)


def dictionaries(acts, device):
    "Return the dictionary and the bases of one site."
    found = {'TopK': train_dictionary(acts, 'topk', WIDTH, K, steps=500, batch=256, seed=0, device=device)}
    widths = {'pca': None, 'ica': 128, 'random': None, 'neurons': None}
    return found | {kind: fit_basis(acts, kind, width) for kind, width in widths.items()}


def measure(model, site, train, held):
    "Return the table of one site."
    acts, acts_held = (token_acts(model, d, site) for d in (train, held))
    found = dictionaries(acts, str(input_device(model)))
    print(site, fit_figures(found['TopK'], acts_held.x), flush=True)
    parts = []
    for rectify in (True, False):
        compared = compare_interpretability(model, found, acts, acts_held, rectify=rectify)
        print(f'rectify={rectify}', compared, flush=True)
        parts.append(compared.to_pandas().assign(site=site, rectify=rectify))
    return pd.concat(parts)


def main(given):
    "Measure every site that is not in the table."
    model = load_model(given.model, given.device)
    name = '' if given.model == 'smollm2-135m' else f'{Path(given.model).name}_'
    path = given.out / f'{name}interpretability.csv'
    given.out.mkdir(parents=True, exist_ok=True)
    train, held = documents(model)
    for site in given.sites:
        table = pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=['site'])
        if site not in set(table.site):
            table = pd.concat([table, measure(model, site, train, held)])
            with whole_file(path) as p:
                table.round(4).to_csv(p, index=False)


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('sites', nargs='*', default=SITES)
    parser.add_argument('--model', default='smollm2-135m')
    parser.add_argument('--device', help="where the model runs, such as 'cuda'; default: a GPU if there is one")
    parser.add_argument('--out', type=Path, default=HERE, help='folder of the table')
    main(parser.parse_args())
