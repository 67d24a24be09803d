"Planted circuits over many seeds and shapes: the model does its task, and the truth is true."

import numpy as np
import pytest
import torch

import circuit_sae.models.behaviour  # noqa: F401
from circuit_sae.core import InputError, all_heads, refuses
from circuit_sae.models.forward import check_writes, run
from circuit_sae.models.load import model_identity
from circuit_sae.truth.planted import PLANTS, plant

families = pytest.mark.parametrize('family', PLANTS)


def zeroed(p, heads):
    "Return the logit_diff of each positive of the most frequent length, with the z of `heads` zero."
    tokens, n = p.task.tokens(p.model), p.task.n
    lengths = [len(ids) for ids in tokens.ids[:n]]
    rows = [i for i in range(n) if lengths[i] == max(set(lengths), key=lengths.count)]

    def zero(head):
        def hook(z, hook):
            z[:, :, head] = 0
            return z

        return hook

    with p.model.hooks(fwd_hooks=[(f'blocks.{h.layer}.attn.hook_z', zero(h.head)) for h in heads]):
        logits = run(p.model, [tokens.ids[i] for i in rows])
    return np.array([(x[tokens.answers[i][0]] - x[tokens.wrongs[i][0]]).item() for i, x in zip(rows, logits)])


@families
def test_the_model_does_its_task_for_every_seed(family):
    for seed in range(10):
        p = plant(family, seed, n=12)
        assert p.task.check(p.model).ok, p


@families
@pytest.mark.parametrize('seed', range(2))
def test_without_noise_only_the_circuit_matters(family, seed):
    p = plant(family, seed, noise=0.0, n=12, distractors=1.0)
    whole = zeroed(p, [])
    outside = [h for h in all_heads(4, 6) if h not in p.truth]
    assert np.abs(zeroed(p, outside) - whole).max() < 1e-4  # all of them at once
    for h in p.truth:
        assert zeroed(p, [h]).mean() < 0.8 * whole.mean(), h


@families
def test_without_noise_negatives_have_no_preference(family):
    p = plant(family, 5, noise=0.0, n=20)
    b = p.task.check(p.model)
    assert np.abs(b.logit_diff[~b.is_positive]).max() < (0.02 if family == 'chain' else 1e-4)


@families
@pytest.mark.parametrize('shape', [(3, 1), (3, 2), (5, 3), (8, 8)])
def test_every_shape_that_fits(family, shape):
    p = plant(family, 1, *shape, n=12)
    assert p.task.check(p.model).ok and check_writes(p.model) < 1e-4
    assert (p.truth.n_layers, p.truth.n_heads) == shape == (p.edges.n_layers, p.edges.n_heads)


@families
def test_truth_edges_and_prompts_are_consistent(family):
    for seed in range(10, 18):
        p = plant(family, seed, n=12)
        assert p.task.lint(p.model) == []
        assert not (p.edges.mask() & ~p.edges.possible()).any()
        assert {h for s, r, _ in p.edges for h in (s, r)} == set(p.truth)
        assert [p.jobs[h] for h in p.truth] == [r for h in p.truth for r, hs in p.truth.roles.items() if h in hs]
        assert all(job not in p.truth.roles for h, job in p.jobs.items() if h not in p.truth)


def test_noise_changes_only_the_weights():
    a, b = plant(seed=3, noise=0.0), plant(seed=3, noise=0.1)
    assert (a.jobs, a.truth, list(a.edges), a.task.examples) == (b.jobs, b.truth, list(b.edges), b.task.examples)
    assert model_identity(a.model)['weights'] != model_identity(b.model)['weights']
    assert model_identity(plant(**b.settings).model) == model_identity(b.model)


def test_models_are_independent():
    a, state = plant(seed=0), torch.get_rng_state()
    ids = a.model.to_tokens(a.task[0].positive)
    before, seen = run(a.model, ids), []
    b = plant(seed=1)
    with b.model.hooks(fwd_hooks=[('blocks.0.attn.hook_z', lambda z, hook: seen.append(1))]):
        assert torch.equal(run(a.model, ids), before) and not seen  # hooks of one model do not run in another
        run(b.model, ids)
    assert seen and torch.equal(torch.get_rng_state(), state)  # the global random state is untouched


REFUSED = [
    (dict(family='chains'), 'unknown-name'),
    (dict(family='chain', n_layers=2), 'circuit-too-large'),
    (dict(n_layers=1), 'circuit-too-large'),
    (dict(copies=13), 'circuit-too-large'),
    (dict(copies=0), 'plant-setting'),
    (dict(noise=-1), 'plant-setting'),
    (dict(noise=float('inf')), 'plant-setting'),
    (dict(noise=float('nan')), 'plant-setting'),
    (dict(d_model=200), 'd-model'),
    (dict(d_model=208.5), 'plant-setting'),
    (dict(distractors=-0.1), 'plant-setting'),
    (dict(strength=-1), 'plant-setting'),
    (dict(seed=-1), 'plant-setting'),
    (dict(seed=0.5), 'plant-setting'),
    (dict(n_heads=0), 'plant-setting'),
]


@pytest.mark.parametrize('settings, code', REFUSED)
def test_impossible_settings_are_refused(settings, code):
    with refuses(code):
        plant(**settings)


def test_one_pair_is_not_enough():
    with pytest.raises(InputError):
        plant(n=1)
