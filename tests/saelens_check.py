"""Compare dictionaries with SAELens, both ways. Run it where `sae-lens` and `fastcore` are installed:

    PYTHONPATH=. python tests/saelens_check.py

1. Ours there: dictionaries of every kind that SAELens has an architecture for, at several sites, are written with
   `save_saelens` and loaded with `SAE.load_from_disk`.
2. Theirs here: autoencoders of SAELens with random weights are saved with `save_model` and read with `load_saelens`.

In both, activations of the features and reconstructions must agree to 1e-5.
"""

import sys
import tempfile
from importlib import metadata
from pathlib import Path

import torch
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAE, SAEMetadata
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

from circuit_sae.features.dictionary import SPARSE_KINDS, SparseDictionary, fit_basis
from circuit_sae.features.files import load_saelens, save_saelens

TOLERANCE = 1e-5
D_IN, WIDTH, N_HEADS = 24, 64, 4


def randomise(parameters, seed):
    "Give weights and biases random values; thresholds become positive."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(parameters, key=lambda item: item[0]):
            noise = torch.randn(p.shape, generator=g)
            p.copy_(noise.abs() * 0.3 if name == 'threshold' else noise * 0.3)


def compare(name, ours, theirs, x, heads=False):
    "Print and return whether activations and reconstructions agree; `heads`: theirs takes [..., n_heads, d_head]."
    there = x.view(len(x), N_HEADS, -1) if heads else x
    with torch.no_grad():
        x_hat, c = ours(x)
        other = theirs.encode(there)
        rebuilt = theirs(there).reshape(x.shape)  # with the reshaping of `z`, `decode` needs an `encode` before it
    active = int((c > 0).sum())
    error = max((c - other).abs().max().item(), (x_hat - rebuilt).abs().max().item())
    fine = error < TOLERANCE and active > 0
    print(f'{"ok  " if fine else "FAIL"} {name:<46} largest difference {error:.1e}, {active} active features')
    return fine


def ours_there(folder, x):
    "Yield whether each dictionary of ours gives the same numbers in SAELens."
    sites = [('L3 attn_out', False), ('L3 z', True), ('L3H1 result', False), ('L3 resid_post', False)]
    for seed, (site, heads) in enumerate(sites):
        for kind in SPARSE_KINDS:
            ours = SparseDictionary(D_IN, WIDTH, kind, k=8, site=site, model=dict(name='some-model')).eval()
            trained = [(n, p) for n, p in ours.named_parameters() if p.requires_grad or n == 'threshold']
            randomise(trained, seed)
            theirs = SAE.load_from_disk(save_saelens(ours, folder / f'{site} {kind}'))
            assert theirs.cfg.metadata.hook_name == ours.site.name.replace('hook_z', hook_end(site))
            assert theirs.cfg.metadata.hook_head_index == ours.site.head
            assert theirs.cfg.metadata.model_name == 'some-model'
            yield compare(f'ours in SAELens: {kind} at {site}', ours, theirs, x, heads)
    basis = fit_basis(x, 'nonnegative pca')
    theirs = SAE.load_from_disk(save_saelens(basis, folder / 'basis'))
    yield compare('ours in SAELens: nonnegative pca', basis, theirs, x)


def hook_end(site):
    "Return the last part of the hook of a site."
    return 'hook_result' if site.endswith('result') else 'hook_z'


def theirs_here(folder, x):
    "Yield whether each autoencoder of SAELens gives the same numbers here."
    classes = [(StandardSAE, StandardSAEConfig), (TopKSAE, TopKSAEConfig), (JumpReLUSAE, JumpReLUSAEConfig)]
    for seed, (make, config) in enumerate(classes):
        for subtract in (True, False):
            for rescale in (False, True) if make is TopKSAE else (False,):
                more = dict(k=8, rescale_acts_by_decoder_norm=rescale) if make is TopKSAE else {}
                about = SAEMetadata(model_name='some-model', hook_name='blocks.3.hook_resid_post')
                theirs = make(config(d_in=D_IN, d_sae=WIDTH, apply_b_dec_to_input=subtract, metadata=about, **more))
                randomise(theirs.named_parameters(), seed)
                name = f'{theirs.cfg.architecture()}, b_dec subtracted: {subtract}, rescaled: {rescale}'
                theirs.save_model(folder / name)
                ours = load_saelens(folder / name)
                assert str(ours.site) == 'L3 resid_post'
                yield compare(f'SAELens here: {name}', ours, theirs, x)


def main():
    "Run all comparisons; exit with 1 if one of them fails."
    x = torch.randn(200, D_IN, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as name:
        results = [*ours_there(Path(name), x), *theirs_here(Path(name), x)]
    print(f'sae-lens {metadata.version("sae-lens")}: {sum(results)} of {len(results)} comparisons agree to {TOLERANCE}')
    sys.exit(0 if all(results) else 1)


if __name__ == '__main__':
    main()
