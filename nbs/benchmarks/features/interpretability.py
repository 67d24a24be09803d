"""Score how well simple explanations predict features of a real model: `python interpretability.py [SITE ...]`.

1. Cut prose of installed packages into documents of 64 tokens; a quarter of the texts is held out.
2. At each site, train a TopK dictionary and fit PCA, ICA, random directions and neurons on the other texts.
3. Score 100 features of each, with activations below zero counted as zero and as they are.

The results of all sites are in `interpretability.csv`, one row a feature. A site that is there already is skipped.
"""

import sys
from pathlib import Path

import pandas as pd

from circuit_sae.core import whole_file
from circuit_sae.features.dictionary import fit_basis
from circuit_sae.features.interpretability import compare_interpretability
from circuit_sae.features.token_acts import installed_prose, text_documents, token_acts
from circuit_sae.features.training import fit_figures, train_dictionary
from circuit_sae.models.load import load_model

HERE = Path(__file__).parent
TABLE = HERE / 'interpretability.csv'
SITES = ['L2 resid_post', 'L5 attn_out']
WIDTH = 1152  # features of the dictionary: twice the width of the residual stream
K = 24  # active features at a token
N_DOCUMENTS = 400


def documents(model):
    "Return documents for training and held-out documents."
    texts = installed_prose('python', 'numpy', max_chars=600 * N_DOCUMENTS)
    return text_documents(model, texts, context=64, skip_short=True, max_documents=N_DOCUMENTS).split(0.25)


def dictionaries(acts):
    "Return the dictionary and the bases of one site."
    found = {'TopK': train_dictionary(acts, 'topk', WIDTH, K, steps=500, batch=256, seed=0)}
    widths = {'pca': None, 'ica': 128, 'random': None, 'neurons': None}
    return found | {kind: fit_basis(acts, kind, width) for kind, width in widths.items()}


def measure(model, site, train, held):
    "Return the table of one site."
    acts, acts_held = (token_acts(model, d, site) for d in (train, held))
    found = dictionaries(acts)
    print(site, fit_figures(found['TopK'], acts_held.x), flush=True)
    parts = []
    for rectify in (True, False):
        compared = compare_interpretability(model, found, acts, acts_held, rectify=rectify)
        print(f'rectify={rectify}', compared, flush=True)
        parts.append(compared.to_pandas().assign(site=site, rectify=rectify))
    return pd.concat(parts)


def main(sites):
    "Measure every site that is not in the table."
    model = load_model('smollm2-135m')
    train, held = documents(model)
    for site in sites:
        table = pd.read_csv(TABLE) if TABLE.is_file() else pd.DataFrame(columns=['site'])
        if site not in set(table.site):
            table = pd.concat([table, measure(model, site, train, held)])
            with whole_file(TABLE) as path:
                table.round(4).to_csv(path, index=False)


if __name__ == '__main__':
    main(sys.argv[1:] or SITES)
