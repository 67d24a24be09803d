"""Feature patching against plain forward passes, and circuits of features against a plain loop."""

import itertools

import numpy as np
import pytest
import torch

from circuit_sae.bench.counting import CountingDevice
from circuit_sae.bench.feature_experiment import NodePasses, effect_shares, measure_dictionary, same_length
from circuit_sae.causal.patching import pair_metric
from circuit_sae.core import InputError
from circuit_sae.data.batches import bind_task, pair_batches
from circuit_sae.data.prompts import induction_task, ioi_task
from circuit_sae.features.dictionary import SparseDictionary, fit_basis
from circuit_sae.features.feature_circuits import all_active, drop_features, feature_circuit, mean_kl
from circuit_sae.features.feature_flow import EDGE_METHODS, feature_edges
from circuit_sae.features.patching import (
    FeaturePasses,
    attribute_features,
    feature_passes,
    patch_features,
)
from circuit_sae.features.reading import next_tokens, read_features, switch_off, upstream_features
from circuit_sae.features.sites import edited, parse_site, read_sites, site_width
from circuit_sae.models.forward import forward, last_logits, run
from circuit_sae.models.load import tiny_model
from circuit_sae.score.flow import difference_flow


@pytest.fixture(scope='module')
def bound():
    return bind_task(tiny_model(n_layers=2), induction_task(n=4))


def sparse(model, site, seed=0):
    "Return an untrained dictionary with more features than the site has coordinates."
    width = site_width(model, site)
    made = SparseDictionary(width, 2 * width, 'topk', k=4, seed=seed, site=site)
    return made.requires_grad_(False).eval()


def by_hand(bound, batch, dictionaries, masks):
    "Return the logits with features patched, from a full forward pass with the published formula."
    model = bound.model
    edits = {}
    for d, mask in zip(dictionaries, masks):
        target = d.encode(read_sites(model, batch.negatives, d.site)[d.site])

        def edit(x, d=d, mask=mask, target=target):
            return x + ((target - d.encode(x)) * mask) @ d.directions

        edits[d.site] = edit
    with torch.no_grad(), edited(model, edits):
        return last_logits(forward(model, batch.positives))


@pytest.mark.parametrize('sites', [['L1 resid_pre'], ['L0 attn_out'], ['L0H1', 'L1 mlp_out'], ['L0 z', 'L1H2 result']])
def test_patching_equals_full_passes_with_the_published_formula(bound, sites):
    dictionaries = [sparse(bound.model, site, i) for i, site in enumerate(sites)]
    rng = np.random.default_rng(0)
    for batch in pair_batches(bound, 24, pad=False):
        passes = FeaturePasses(bound, batch, dictionaries)
        masks = [torch.tensor(rng.random(d.width) < 0.4).float() for d in dictionaries]
        n = len(batch.pairs)
        found = passes.run(torch.arange(n), torch.cat(masks).repeat(n, 1))
        expected = by_hand(bound, batch, dictionaries, masks)
        assert (found - expected).abs().max() < 1e-4
        assert (expected - passes.logits).abs().max() > 1e-4


@pytest.mark.parametrize('site', ['L1 resid_pre', 'L0 resid_post', 'L1H1'])
@pytest.mark.parametrize('kind', ['neurons', 'random'])
def test_all_features_of_a_complete_basis_replace_the_activation(bound, site, kind):
    width = site_width(bound.model, site)
    basis = fit_basis(torch.randn(3 * width, width, generator=torch.Generator().manual_seed(0)), kind)
    basis.site = parse_site(site)
    for batch in pair_batches(bound, 24, pad=False):
        passes = FeaturePasses(bound, batch, [basis])
        n = len(batch.pairs)
        found = passes.run(torch.arange(n), torch.ones(n, width))
        other = read_sites(bound.model, batch.negatives, site)[basis.site]
        with torch.no_grad(), edited(bound.model, {site: lambda x: other}):
            expected = last_logits(forward(bound.model, batch.positives))
        assert (found - expected).abs().max() < 1e-4


def test_error_stays_where_nothing_is_patched(bound):
    for passes in feature_passes(bound, None, sparse(bound.model, 'L1 resid_pre')):
        n = len(passes.pairs)
        assert torch.equal(passes.run(torch.arange(n), torch.zeros(n, passes.widths[0])), passes.logits)


def test_gradient_is_the_slope_of_the_exact_effect(bound):
    d = sparse(bound.model, 'L1 resid_pre')
    metric = pair_metric('kl_div')
    found = attribute_features(bound, None, d, 'gradient', metric='kl_div')
    step = 1e-2
    for passes in feature_passes(bound, None, d):
        masks = step * torch.eye(d.width)[passes.active()]
        measured = (passes.measure_clean(metric)[0] - passes.measure(metric, masks)) / step
        estimated = found.drop[passes.pairs][:, passes.active().numpy()].T
        assert np.abs(measured.numpy() - estimated).max() < 0.1 * np.abs(estimated).max()


def test_the_discrete_gradient_is_complete_over_a_basis(bound):
    basis = fit_basis(torch.randn(100, 32, generator=torch.Generator().manual_seed(0)), 'pca')
    basis.site = parse_site('L1 resid_pre')
    found = attribute_features(bound, None, basis, 'discrete', metric='logit_diff')
    assert np.allclose(found.drop.sum(1), found.clean - found.corrupted, atol=1e-3)


def test_dropping_equals_a_plain_loop(bound):
    d = sparse(bound.model, 'L1 resid_pre')
    passes = list(feature_passes(bound, None, d, batch_size=2))
    everything = all_active(passes)
    orders = [np.random.default_rng(seed).permutation(d.width) for seed in range(2)]
    masks, kl = drop_features(passes, orders, [1e-4, 1e-2])
    for order, tau, mask, last in zip(orders, [1e-4, 1e-2], masks, kl):
        kept = everything.clone()
        now = mean_kl(passes, kept[None])[0]
        for f in itertools.compress(order, everything[order]):
            trial = kept.clone()
            trial[f] = False
            new = mean_kl(passes, trial[None])[0]
            if new - now < tau:
                kept, now = trial, new
        assert torch.equal(kept, mask) and abs(now - last) < 1e-5


@pytest.mark.parametrize('changes, code', [
    (dict(features=[99]), 'no-such-feature'),
    (dict(features=[1, 1]), 'no-such-feature'),
    (dict(features=[]), 'no-such-feature'),
    (dict(features=[0.5]), 'no-such-feature'),
    (dict(positions=[99]), 'no-such-position'),
    (dict(positions='first'), 'unknown-name'),
    (dict(metric='logits'), 'unknown-name'),
])  # fmt: skip
def test_bad_settings_are_refused(bound, changes, code):
    d = sparse(bound.model, 'L1H2')
    with pytest.raises(InputError) as e:
        patch_features(bound, None, d, **dict(features=[0]) | changes)
    assert e.value.code == code


def test_dictionaries_of_another_model_or_site_are_refused(bound):
    d = sparse(bound.model, 'L1H2')
    d.site = parse_site('L1 resid_pre')
    other = sparse(bound.model, 'L1H2')
    other.model = dict(name='other', weights='0')
    for wrong, code in ((d, 'other-width'), (other, 'other-model'), ('L1H2', 'not-a-dictionary')):
        for function in (patch_features, attribute_features, feature_circuit):
            with pytest.raises(InputError) as e:
                function(bound, None, wrong)
            assert e.value.code == code


def test_run_does_not_change_the_model(bound):
    batch = pair_batches(bound, 24, pad=False)[0]
    before = run(bound.model, batch.positives)
    patch_features(bound, None, sparse(bound.model, 'L0H1'), [0, 1, 2])
    assert torch.equal(before, run(bound.model, batch.positives))


def everything(bound):
    "Return what the package computes with dictionaries, as arrays."
    model = bound.model
    early, late, head = (sparse(model, site) for site in ('L0 z', 'L1 resid_pre', 'L1H2'))
    found = [attribute_features(bound, None, late, method).drop for method in ('gradient', 'discrete')]
    found += [patch_features(bound, None, late, range(8)).drop]
    circuit = feature_circuit(bound, None, [early, late], n_random=2)
    found += [circuit.measured['patched'], circuit.random.mean(1), difference_flow(bound).by_feature(head, bound).drop]
    found += [feature_edges(bound, None, early, head, range(4), range(4), m).by_pair for m in EDGE_METHODS[1:3]]
    cards = read_features(model, late, range(3), task=bound)
    found += [[v for card in cards for _, v in card.promoted], switch_off(bound, None, late, range(3)).metric]
    found += [[p for _, tokens in next_tokens(bound, None, late, [1], 2) for _, p in tokens]]
    found += [[v for *_, v in upstream_features(bound, None, late, 0, early)]]
    pairs = same_length(bound, 4)
    (batch,) = pair_batches(pairs, 4, pad=False)
    for passes in (FeaturePasses(pairs, batch, [late]), NodePasses(pairs, batch, 1)):
        found += [[row[-2:] for row in measure_dictionary(passes, batch)]]
    coordinates = fit_basis(torch.randn(100, 8, generator=torch.Generator().manual_seed(0)), 'neurons')
    coordinates.site = parse_site('L1H2')
    return [np.asarray(x) for x in [*found, effect_shares(pairs, head, coordinates, [1, 2])]]


def test_everything_is_the_same_on_another_device():
    "On a device that refuses tensors of the CPU, as a GPU does, the figures are those of the CPU."
    bound = same_length(bind_task(tiny_model(n_layers=2), ioi_task(n=40)), 4)
    assert bound.n == 4
    expected = everything(bound)
    with CountingDevice(bound.model):
        found = everything(bound)
    for a, b in zip(expected, found):
        np.testing.assert_allclose(a, b, atol=2e-3)


def test_flow_by_feature_sums_to_the_flow_and_agrees_with_coordinates(bound):
    "Features and error sum to the flow of every site; the part of each feature is its direction's part of the flow."
    flow = difference_flow(bound)
    flows = {'L1H2': flow.by_pair[:, flow.index('L1H2')], 'L0 mlp_out': flow.mlps[:, 0]}
    flows |= {site: flow.by_pair[:, 4:].sum(1) for site in ('L1 z', 'L1 attn_out')}
    flows['L0H3 result'] = flow.by_pair[:, 3]
    for site, expected in flows.items():
        found = flow.by_feature(sparse(bound.model, site), bound)
        np.testing.assert_allclose(found.total, expected, atol=1e-4)
        assert np.abs(found.error).max() > 0 and np.abs(found.drop).max() > 0
    width = site_width(bound.model, 'L1H2')
    basis, sized = (fit_basis(torch.randn(50, width), 'neurons') for _ in range(2))
    basis.site = sized.site = parse_site('L1H2')
    sized.analysis, sized.directions = sized.analysis * 2, sized.directions / 2
    a, b = (flow.by_feature(d, bound).drop for d in (basis, sized))
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_small_change_of_a_sender_moves_the_receiver_by_the_gradient(bound):
    "Edges by gradient are the slope of what patching a small part of a sender feature does, by full forward passes."
    sender, receiver = sparse(bound.model, 'L0H1'), sparse(bound.model, 'L1H2', 1)
    edges = feature_edges(bound, None, sender, receiver, receivers=range(16))
    exact = np.zeros((bound.n, *edges.values.shape))
    for batch in pair_batches(bound, 24, pad=False):
        sites = [sender.site, receiver.site]
        x, y = (read_sites(bound.model, ids, sites) for ids in (batch.positives, batch.negatives))
        c, c_neg = (sender.encode(own[sender.site]) for own in (x, y))
        active = (receiver.encode(x[receiver.site]) != 0) | (receiver.encode(y[receiver.site]) != 0)
        before = receiver.before_activation(x[receiver.site])
        for i, feature in enumerate(edges.senders):
            step = 1e-3 * ((c_neg - c)[..., [feature]] @ sender.directions[[feature]])
            with torch.no_grad(), edited(bound.model, {sender.site: lambda x, step=step: x + step}):
                new = receiver.before_activation(read_sites(bound.model, batch.positives, receiver.site)[receiver.site])
            exact[batch.pairs, i] = ((before - new) * active).sum(1).numpy() / 1e-3
    assert np.abs(exact).max() > 0
    np.testing.assert_allclose(edges.by_pair, exact, atol=0.03 * np.abs(exact).max())


def test_patched_edges_equal_full_passes(bound):
    sender, receiver = sparse(bound.model, 'L0H1'), sparse(bound.model, 'L1H2', 1)
    edges = feature_edges(bound, None, sender, receiver, method='patching')
    (i, j, _), *_ = edges.ranked(1)
    falls = np.zeros(bound.n)
    for batch in pair_batches(bound, 24, pad=False):
        target = sender.encode(read_sites(bound.model, batch.negatives, sender.site)[sender.site])

        def edit(x, target=target):
            return x + (target - sender.encode(x))[..., [i]] @ sender.directions[[i]]

        before = read_sites(bound.model, batch.positives, receiver.site)[receiver.site]
        with edited(bound.model, {sender.site: edit}):
            after = read_sites(bound.model, batch.positives, receiver.site)[receiver.site]
        falls[batch.pairs] = (receiver.encode(before) - receiver.encode(after))[..., j].sum(1).numpy()
    place = edges.senders.tolist().index(i), edges.receivers.tolist().index(j)
    np.testing.assert_allclose(edges.by_pair[:, place[0], place[1]], falls, atol=1e-4)
    assert np.abs(falls).max() > 1e-3
