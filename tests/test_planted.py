"Planted circuits over many seeds and shapes: the model does its task, and the truth is true."
import numpy as np, pytest, torch

from circuit_sae.models.behaviour import *
from circuit_sae.core import InputError, all_heads
from circuit_sae.models.load import check_writes, model_identity, run
from circuit_sae.truth.planted import PLANTS, plant

families = pytest.mark.parametrize('family', PLANTS)

def zeroed(p, heads):
    "logit_diff of each positive, at the length of most, with the z of `heads` zero."
    t, N = p.task.tokens(p.model), p.task.n
    lengths = [len(i) for i in t.ids[:N]]
    rows = [i for i in range(N) if lengths[i] == max(set(lengths), key=lengths.count)]
    def zero(head):
        def put(z, hook): z[:, :, head] = 0; return z
        return put
    with p.model.hooks(fwd_hooks=[(f'blocks.{h.layer}.attn.hook_z', zero(h.head)) for h in heads]): logits = run(p.model, [t.ids[i] for i in rows])
    return np.array([(l[t.answers[i][0]] - l[t.wrongs[i][0]]).item() for i, l in zip(rows, logits)])

@families
def test_the_model_does_its_task_in_every_seed(family):
    for seed in range(30):
        p = plant(family, seed, n=12)
        assert p.task.check(p.model).ok, p

@families
@pytest.mark.parametrize('seed', range(4))
def test_without_noise_only_the_circuit_matters(family, seed):
    p = plant(family, seed, noise=0., n=12, distractors=1.)
    whole, outside = zeroed(p, []), [h for h in all_heads(4, 6) if h not in p.truth]
    assert np.abs(zeroed(p, outside) - whole).max() < 1e-4                 # all of them at once
    for h in p.truth: assert zeroed(p, [h]).mean() < .8*whole.mean(), h

@families
def test_without_noise_a_negative_says_nothing(family):
    p = plant(family, 5, noise=0., n=20)
    b = p.task.check(p.model)
    assert np.abs(b.logit_diff[~b.is_positive]).max() < (.02 if family == 'chain' else 1e-4)

@families
@pytest.mark.parametrize('shape', [(3, 1), (3, 2), (5, 3), (8, 8)])
def test_any_shape_that_has_room(family, shape):
    p = plant(family, 1, *shape, n=12)
    assert p.task.check(p.model).ok and check_writes(p.model) < 1e-4
    assert (p.truth.n_layers, p.truth.n_heads) == shape == (p.edges.n_layers, p.edges.n_heads)

@families
def test_truth_edges_and_prompts_fit_together(family):
    for seed in range(20):
        p = plant(family, seed, n=12)
        assert p.task.lint(p.model) == []
        assert not (p.edges.mask() & ~p.edges.possible()).any()
        assert {h for s, r, _ in p.edges for h in (s, r)} == set(p.truth)
        assert [p.jobs[h] for h in p.truth] == [r for h in p.truth for r, hs in p.truth.roles.items() if h in hs]
        assert all(job not in p.truth.roles for h, job in p.jobs.items() if h not in p.truth)

def test_noise_changes_the_weights_and_nothing_else():
    a, b = plant(seed=3, noise=0.), plant(seed=3, noise=.1)
    assert (a.jobs, a.truth, list(a.edges), a.task.examples) == (b.jobs, b.truth, list(b.edges), b.task.examples)
    assert model_identity(a.model)['weights'] != model_identity(b.model)['weights']
    assert model_identity(plant(**b.settings).model) == model_identity(b.model)

def test_models_are_independent():
    a, state = plant(seed=0), torch.get_rng_state()
    ids = a.model.to_tokens(a.task[0].positive)
    before, seen = run(a.model, ids), []
    b = plant(seed=1)
    with b.model.hooks(fwd_hooks=[('blocks.0.attn.hook_z', lambda z, hook: seen.append(1))]):
        assert torch.equal(run(a.model, ids), before) and not seen         # another model's hooks are its own
        run(b.model, ids)
    assert seen and torch.equal(torch.get_rng_state(), state)              # and nobody else's random numbers are drawn

@pytest.mark.parametrize('kw, says', [
    (dict(family='chains'), "Did you mean 'chain'?"), (dict(family='chain', n_layers=2), 'no room'), (dict(n_layers=1), 'no room'),
    (dict(copies=13), 'no room'), (dict(copies=0), 'copies = 0'), (dict(noise=-1), 'noise = -1'), (dict(noise=float('inf')), 'noise = inf'),
    (dict(d_model=200), 'too small'), (dict(d_model=208.5), 'd_model = 208.5'), (dict(distractors=-.1), 'distractors'), (dict(strength=-1), 'strength'),
    (dict(seed=-1), 'seed = -1'), (dict(seed=.5), 'seed = 0.5'), (dict(n_heads=0), 'n_heads = 0'), (dict(n=1), '1 pairs')])
def test_what_cannot_be_planted_is_refused(kw, says):
    with pytest.raises(InputError) as e: plant(**kw)
    assert says in str(e.value)
