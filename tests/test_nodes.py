"Embedding, heads and MLPs as nodes: gradients, patching and circuits agree with runs written out."

import json

import numpy as np
import pytest
import torch
from transformers import (
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    Olmo2Config,
)

from circuit_sae.causal.nodes import NodeEffects, NodeSubstitutes, patch_neurons, patch_nodes
from circuit_sae.causal.patching import HeadEffects, patch_heads
from circuit_sae.causal.paths import PathEffects, draw_edges
from circuit_sae.core import InputError
from circuit_sae.data.batches import bind_task, pair_batches
from circuit_sae.data.prompts import ioi_task, tiny_tokenizer
from circuit_sae.models.forward import forward, last_logits
from circuit_sae.models.load import save_random_model
from circuit_sae.results import HeadScores, NodeScores, all_nodes, node_index
from circuit_sae.score.attribution import attribute_heads
from circuit_sae.score.nodes import attribute_neurons, attribute_nodes, batch_metric, collect_nodes, node_sites
from circuit_sae.truth.faithfulness import (
    MIB_FRACTIONS,
    FaithfulnessCurve,
    export_mib,
    faithfulness_curve,
    measure_circuits,
    random_nodes,
    read_mib,
    top_nodes,
)
from circuit_sae.truth.references import effects_file, reference_edges

D_VOCAB = len(tiny_tokenizer())
SHAPE = dict(vocab_size=D_VOCAB, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
GQA = dict(SHAPE, num_key_value_heads=2)
ARCHITECTURES = dict(
    gpt2=GPT2Config(vocab_size=D_VOCAB, n_embd=48, n_layer=2, n_head=4, n_positions=256),
    neox=GPTNeoXConfig(**SHAPE),  # parallel attention and MLP, two norms
    cohere=CohereConfig(**GQA),  # parallel, one norm, gated MLP
    gemma2=Gemma2Config(**GQA, head_dim=16, sliding_window=8),  # norms before and after, scaled embeddings
    olmo2=Olmo2Config(**GQA),  # norms after attention and MLP only
    granite=GraniteConfig(**GQA, residual_multiplier=0.22),  # scaled writes
)
N_NODES = 11


@pytest.fixture(scope='module', params=ARCHITECTURES)
def bound(request, tmp_path_factory):
    "Three IOI pairs, bound to a random model of one architecture."
    folder = tmp_path_factory.mktemp(request.param)
    model = save_random_model(ARCHITECTURES[request.param], folder, noise=0.3, device='cpu')
    return bind_task(model, ioi_task(n=3, seed=3))


@pytest.fixture(scope='module')
def gpt2(tmp_path_factory):
    "Three IOI pairs, bound to a random GPT-2."
    model = save_random_model(ARCHITECTURES['gpt2'], tmp_path_factory.mktemp('gpt2'), noise=0.3, device='cpu')
    return bind_task(model, ioi_task(n=3, seed=3))


def site_of(model, node):
    "Return the hook of a node and its column there."
    [site] = [s for s in node_sites(model) if s.nodes.start <= node < s.nodes.stop]
    return site.hook, node - site.nodes.start


def literal(bound, batch, changes):
    "Run a batch of positives from the first layer with a change of each hook: {hook name: function of the activation}."

    def hook(change):
        return lambda x, hook: change(x.clone())

    with torch.no_grad(), bound.model.hooks(fwd_hooks=[(name, hook(change)) for name, change in changes.items()]):
        return last_logits(forward(bound.model, batch.positives))


def put(column, new, part=1.0):
    "Return a change that moves one node's output towards `new`."

    def change(x):
        at = (slice(None), slice(None), column) if x.ndim == 4 else ()
        x[at] = x[at] + part * (new[at] - x[at])
        return x

    return change


def gap_and_falls(bound, changes_of):
    "Return the fall of the metric with changes, and its difference, each summed over the pairs."
    fall = gap = 0.0
    for batch in pair_batches(bound, pad=False):
        logits, outputs = collect_nodes(bound.model, batch.negatives)
        measure = batch_metric(bound, 'logit_diff', batch, logits)
        clean = measure(literal(bound, batch, {}))
        fall += (clean - measure(literal(bound, batch, changes_of(outputs)))).double().sum().item()
        gap += (clean - measure(logits)).double().sum().item()
    return fall, gap


@pytest.mark.parametrize('ablation', ['resample', 'mean'])
def test_patching_is_the_literal_patching(bound, ablation):
    effects = patch_nodes(bound, ablation=ablation, batch_size=2)
    substitutes = NodeSubstitutes(bound, ablation)
    for batch in pair_batches(bound, pad=False):
        logits, outputs = substitutes(batch)
        measure = batch_metric(bound, 'logit_diff', batch, logits)
        for node in range(N_NODES):
            hook, column = site_of(bound.model, node)
            wanted = measure(literal(bound, batch, {hook: put(column, outputs[hook])}))
            np.testing.assert_allclose(
                effects.patched[batch.pairs, node], wanted, atol=2e-6 + 2e-4 * wanted.abs().max()
            )
    heads = patch_heads(bound, ablation=ablation)
    np.testing.assert_allclose(effects.heads_only().signed, heads.signed, atol=1e-3 * heads.values.max())


def test_attribution_is_the_slope_of_patching(bound):
    scores = attribute_nodes(bound)
    slopes = []
    for node in range(N_NODES):
        hook, column = site_of(bound.model, node)

        def move(outputs, part, hook=hook, column=column):
            return {hook: put(column, outputs[hook], part)}

        up, gap = gap_and_falls(bound, lambda outputs, move=move: move(outputs, 2e-3))
        down, _ = gap_and_falls(bound, lambda outputs, move=move: move(outputs, -2e-3))
        slopes.append((up - down) / 4e-3 / gap)
    np.testing.assert_allclose(scores.signed, slopes, atol=0.02 * scores.values.max())
    heads = attribute_heads(bound)
    np.testing.assert_allclose(scores.heads_only().signed, heads.signed, atol=1e-5 * max(1, heads.values.max()))


def test_neurons_sum_to_their_mlp(gpt2):
    scores = attribute_nodes(gpt2)
    assert attribute_neurons(gpt2, 'L1MLP').sum() == pytest.approx(scores['L1MLP'], rel=1e-3)
    found = patch_neurons(gpt2, 'L1MLP', neurons=[5])

    fall = gap = 0.0
    for batch in pair_batches(gpt2, pad=False):
        hook = 'blocks.1.mlp.out.hook_in'
        logits, outputs = collect_nodes(gpt2.model, batch.negatives, hooks=[hook])
        measure = batch_metric(gpt2, 'logit_diff', batch, logits)

        def swap(x, new=outputs[hook]):
            x[..., 5] = new[..., 5]
            return x

        clean = measure(literal(gpt2, batch, {}))
        fall += (clean - measure(literal(gpt2, batch, {hook: swap}))).sum().item()
        gap += (clean - measure(logits)).sum().item()
    assert found.effect[0] == pytest.approx(fall / gap, rel=1e-3, abs=1e-5)


def test_circuits_are_the_literal_circuits(bound):
    rng = np.random.default_rng(0)
    kept = rng.random((3, N_NODES)) < 0.6
    kept[:, 0] = True
    kept[2, 0] = False  # without the embedding the model sees the negative
    found = measure_circuits(bound, kept, batch_size=2)
    for batch in pair_batches(bound, pad=False):
        logits, outputs = collect_nodes(bound.model, batch.negatives)
        measure = batch_metric(bound, 'logit_diff', batch, logits)
        for row, circuit in zip(found, kept):
            changes = {}
            for node in np.flatnonzero(~circuit):
                hook, column = site_of(bound.model, node)
                before = changes.get(hook, lambda x: x)
                changes[hook] = lambda x, f=before, c=column, new=outputs[hook]: put(c, new)(f(x))
            wanted = measure(literal(bound, batch, changes))
            np.testing.assert_allclose(row[batch.pairs], wanted, atol=2e-6 + 2e-4 * wanted.abs().max())
        np.testing.assert_allclose(found[2, batch.pairs], measure(logits), atol=2e-6 + 2e-4 * wanted.abs().max())


def test_areas_are_those_of_mib(gpt2):
    "The loop of MIB, written out."
    scores = random_nodes(gpt2, seed=3)
    curve = faithfulness_curve(gpt2, scores, rank='size')
    assert curve.n_kept == [int(k * N_NODES) for k in MIB_FRACTIONS]
    f = curve.faithfulness
    under = from_one = 0.0
    for i in range(len(f) - 1):
        width = MIB_FRACTIONS[i + 1] - MIB_FRACTIONS[i]
        under += width * (f[i] + f[i + 1]) / 2
        from_one += width * (abs(1 - f[i]) + abs(1 - f[i + 1])) / 2
    assert (curve.cpr, curve.cmd) == (pytest.approx(under), pytest.approx(from_one))
    assert f[-1] == pytest.approx(1, abs=1e-4) and f[0] == pytest.approx(0, abs=1e-4)


def test_error_of_the_area_is_the_spread_over_draws_of_pairs():
    rng = np.random.default_rng(0)
    fractions = [0.1, 0.5, 1.0]

    def draw(n):
        gap = rng.normal(4, 1, n)
        metric = np.stack([0.2 * gap, 0.7 * gap, gap]) + rng.normal(0, 0.5, (3, n))
        return FaithfulnessCurve(fractions, metric, gap, np.zeros(n))

    curves = [draw(40) for _ in range(400)]
    assert np.std([c.cpr for c in curves]) == pytest.approx(np.mean([c.cpr_se for c in curves]), rel=0.15)


def test_ranking_keeps_what_has_no_score():
    signed = np.array([np.nan, 3.0, -5.0, 1.0, 2.0])
    assert top_nodes(signed, 0.5).tolist() == [True, True, False, False, True]
    assert top_nodes(signed, 0.5, 'size').tolist() == [True, True, True, False, False]
    heads = HeadScores([1.0, 2.0], n_heads=1)
    assert len(all_nodes(2, 1)) == 5 and heads.n_layers == 2


def test_files_come_back(gpt2, tmp_path):
    effects = patch_nodes(gpt2, nodes=['embed', 'L0MLP', 'L1H3'])
    effects.save(tmp_path / 'effects.safetensors')
    again = NodeEffects.load(tmp_path / 'effects.safetensors')
    np.testing.assert_array_equal(again.signed, effects.signed)
    assert again.measured.sum() == 3 and again.ranked(1) == effects.ranked(1)
    assert isinstance(NodeScores.load(tmp_path / 'effects.safetensors'), NodeEffects)

    path = export_mib(effects, tmp_path, 'ioi', gpt2.model)
    found = json.loads(path.read_text())
    assert path.parent.name == f'ioi_{effects.made_from["model"]["name"]}'
    assert found['cfg'] == dict(n_layers=2, n_heads=4, parallel_attn_mlp=False, d_model=48)
    assert list(found['nodes'])[:7] == ['input', 'a0.h0', 'a0.h1', 'a0.h2', 'a0.h3', 'm0', 'a1.h0']
    assert found['nodes']['m0'] == dict(in_graph=True, score=effects['m0']) and found['edges'] == {}
    assert 'score' not in found['nodes']['a0.h0']  # not measured: MIB keeps it in every circuit
    np.testing.assert_array_equal(read_mib(path).signed, effects.signed)


def test_names_of_nodes_are_indices():
    for i, node in enumerate(all_nodes(3, 2)):
        assert node_index(node, 3, 2) == node_index(str(node), 3, 2) == i
    for wrong in ('L3', 'MLP', 3, None, 'm'):
        with pytest.raises(InputError) as e:
            node_index(wrong, 3, 2)
        assert e.value.code == 'not-a-node'


def test_drawn_edges_cover_every_stratum():
    rng = np.random.default_rng(0)
    effects = HeadScores(rng.choice([0.001, 0.02, 0.2], 60, p=[0.7, 0.2, 0.1]), n_heads=6)
    edges, record = draw_edges(effects, n=200, seed=1)
    assert len(set(edges)) == 200
    for s in record['strata']:
        assert s['drawn'] <= s['of'] and (s['drawn'] > 0) == (s['of'] > 0)
    open_ = [s for s in record['strata'] if s['drawn'] < s['of']]
    rates = [s['drawn'] / ((s['sender'] + 1) * (s['receiver'] + 1)) for s in open_]
    assert max(rates) - min(rates) <= 1.0 + 1e-9


DRAWN = {
    (model, task): 0.01 for model in ('smollm2-135m', 'gemma3-270m') for task in ('ioi', 'induction', 'greater_than')
}
DRAWN['smollm2-135m', 'greater_than'] = 0.001


@pytest.mark.parametrize(('case', 'effect'), DRAWN.items())
def test_drawn_edges_of_the_package_are_readable(case, effect):
    model, task = case
    sample = PathEffects.load(effects_file(task, model).parent / f'{task}-drawn-edges.json')
    truth = reference_edges(f'{task}-drawn', model=model, effect=effect)
    assert sample.reference(effect) == truth and len(sample) >= 300
    assert 0.03 < len(truth) / len(sample) < 0.5
    assert sample.edges == draw_edges(HeadEffects.load(effects_file(task, model)), len(sample))[0]


def test_greater_than_has_no_edge_at_one_percent():
    with pytest.raises(InputError) as e:
        reference_edges('greater_than-drawn', model='smollm2-135m', effect=0.01)
    assert e.value.code == 'no-effect' and '1% or more' in str(e.value)
    assert reference_edges('greater_than-drawn', model='smollm2-135m', effect=0.001).variant.endswith('0.1%')
