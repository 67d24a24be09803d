"Interventions on models of six architectures agree with the literal way: the whole model run from its first layer."

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    Olmo2Config,
)

from circuit_sae.causal import verify
from circuit_sae.causal.patching import (
    ABLATIONS,
    HeadEffects,
    PatchPasses,
    Substitutes,
    effects_record,
    new_effects,
    pair_metric,
    patch_heads,
)
from circuit_sae.causal.paths import INPUTS, PathEffects, patch_paths
from circuit_sae.causal.verify import branch_rows, clean_pass, measure_sets, verify_circuit
from circuit_sae.core import all_heads, refuses
from circuit_sae.data.batches import bind_task, pair_batches
from circuit_sae.data.prompts import induction_task, ioi_task
from circuit_sae.data.tasks import Task
from circuit_sae.models.behaviour import get_metric
from circuit_sae.models.forward import run
from circuit_sae.models.load import load_model, quietly, save_random_model, tiny_model, tiny_tokenizer
from circuit_sae.models.rerun import Midway, collect_z, reruns, run_edited
from circuit_sae.models.writes import write_matrices
from circuit_sae.results import load_scores
from circuit_sae.score.attribution import attribute_heads
from circuit_sae.truth.planted import plant
from circuit_sae.truth.references import effects_file, reference, reference_edges

tokenizer = tiny_tokenizer()
size = dict(
    vocab_size=len(tokenizer),
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=256,
)
grouped = size | dict(num_key_value_heads=2, head_dim=16)
CONFIGS = dict(
    gpt2=GPT2Config(vocab_size=len(tokenizer), n_embd=48, n_layer=3, n_head=4, n_positions=256),
    llama=LlamaConfig(**grouped),
    gemma2=Gemma2Config(**grouped, sliding_window=8),
    olmo2=Olmo2Config(**grouped),
    granite=GraniteConfig(**grouped, residual_multiplier=0.3),
    neox=GPTNeoXConfig(**size),
)
METRIC = get_metric('logit_diff')


@pytest.fixture(scope='module', params=CONFIGS)
def bound(request, tmp_path_factory):
    "Five IOI pairs, bound to a random model of one architecture."
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(CONFIGS[request.param])
    for p in hf.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.3)
    with quietly():
        hf.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return bind_task(load_model(str(folder)), ioi_task(n=5, seed=3))


@pytest.fixture(scope='module')
def tiny():
    "Three induction pairs, bound to a tiny model."
    return bind_task(tiny_model(n_layers=3), induction_task(n=3))


def replace(at_layer, head, new, positions=slice(None)):
    "Return an edit that replaces the `z` of one head at some positions."

    def edit(layer, z):
        if layer == at_layer:
            z = z.clone()
            z[:, positions, head] = new[:, positions, head]
        return z

    return edit


def close(found, wanted, tol=1e-4):
    "Compare two arrays, with a tolerance relative to the largest entry."
    wanted = np.asarray(wanted)
    np.testing.assert_allclose(found, wanted, atol=tol * max(1, np.abs(wanted).max()))


@pytest.mark.parametrize('positions', ['all', [3, -1]])
@pytest.mark.parametrize('ablation', ABLATIONS)
def test_patching_is_the_literal_patching(bound, ablation, positions):
    effects = patch_heads(bound, ablation=ablation, positions=positions, batch_size=2)
    substitutes = Substitutes(bound, ablation)
    where = slice(None) if positions == 'all' else positions
    for batch in pair_batches(bound, pad=False):
        z = substitutes(batch)[1]
        for layer, head in ((0, 1), (1, 3), (2, 0)):
            logits = run_edited(bound.model, batch.positives, replace(layer, head, z[layer], where))
            wanted = bound.measure(METRIC, logits, batch.pairs)
            close(effects.patched[batch.pairs, layer * 4 + head], wanted)


def test_order_and_batches_change_nothing(bound):
    one = patch_heads(bound)
    backwards = Task.from_data(bound.task.bind(bound.model).examples[::-1], name='backwards')
    other = patch_heads(bound.model, backwards, batch_size=1)
    close(other.patched[::-1], one.patched)


def test_a_rerun_leaves_the_model_as_it_was(bound):
    batch = pair_batches(bound, pad=False)[0]
    before = run(bound.model, batch.positives)
    with pytest.raises(RuntimeError):
        Midway(bound.model, batch.positives).rerun(1, torch.arange(len(batch.pairs)), lambda z: z[:, :, :1])
    assert torch.equal(run(bound.model, batch.positives), before)


def test_paths_and_attribution_run(bound):
    edges = patch_paths(bound, heads=['L0H0', 'L1H1', 'L2H3'])
    assert len(edges) == 3 and np.isfinite(edges.effect).all() and (edges.size > 0).all()
    assert np.isfinite(attribute_heads(bound.model, bound.task, steps=2).values).all()


def test_attribution_is_the_slope_of_patching(bound):
    "A head patched a small part of the way moves the metric by that part of its attribution."
    attribution = attribute_heads(bound.model, bound.task).signed
    gap = 0
    slopes = {(0, 2): 0, (2, 1): 0}
    for batch in pair_batches(bound, pad=False):
        (clean, z), (corrupted, z_neg) = (collect_z(bound.model, ids) for ids in (batch.positives, batch.negatives))

        def metric(logits):
            return bound.measure(METRIC, logits, batch.pairs).double().sum().item()

        gap += metric(clean) - metric(corrupted)
        for layer, head in slopes:
            ends = []
            for part in (-5e-3, 5e-3):
                new = z[layer] + part * (z_neg[layer] - z[layer])
                ends.append(metric(run_edited(bound.model, batch.positives, replace(layer, head, new))))
            slopes[layer, head] += (ends[0] - ends[1]) / 1e-2
    for (layer, head), slope in slopes.items():
        assert abs(slope / gap - attribution[layer * 4 + head]) < 0.05 * np.abs(attribution).max() + 1e-2 / abs(gap)


def literal_edge(bound, sender, receiver, only):
    "Return the effect of one edge through one input, one prompt at a time, with nothing shared and nothing skipped."
    model, n = bound.model, bound.n
    W = write_matrices(model)
    at = f'blocks.{receiver[0]}.'
    falls, gaps = [], []
    for i in range(n):
        positive, negative = (torch.tensor([bound.tokens.ids[j]]) for j in (i, i + n))
        (clean, z), (corrupted, z_neg) = collect_z(model, positive), collect_z(model, negative)
        change = (z_neg - z)[sender[0], :, :, sender[1]] @ W[sender[0], sender[1]]
        kept = {}

        def keep(name):
            return lambda x, hook: kept.update({name: x.clone()})

        def use(name):
            return lambda x, hook: kept[name]

        with torch.no_grad(), model.hooks(fwd_hooks=[(f'{at}attn.hook_{c}', keep(c)) for c in INPUTS]):
            run(model, positive)
        hooks = [(f'{at}hook_in', lambda x, hook: x + change), (f'{at}attn.hook_z', keep('z'))]
        hooks += [(f'{at}attn.hook_{c}', use(c)) for c in INPUTS if c != only]
        with torch.no_grad(), model.hooks(fwd_hooks=hooks):
            run(model, positive)
        patched = run_edited(model, positive, replace(*receiver, kept['z']))
        clean, patched, corrupted = (bound.measure(METRIC, x, [i]).item() for x in (clean, patched, corrupted))
        falls.append(clean - patched)
        gaps.append(clean - corrupted)
    return np.mean(falls) / np.mean(gaps)


def test_paths_are_the_literal_paths(tiny):
    found = patch_paths(tiny, heads=['L0H1', 'L0H3', 'L1H0', 'L2H2'])
    for sender, receiver in [((0, 1), (1, 0)), ((0, 3), (2, 2)), ((1, 0), (2, 2))]:
        row = found.effect[found.edges.index((sender, receiver))]
        close(row, [literal_edge(tiny, sender, receiver, c) for c in INPUTS])


def literal_set(bound, kept, ablation):
    "Return the metric of every positive with the heads not in `kept` ablated, one prompt and one head at a time."
    model, n, ids = bound.model, bound.n, bound.tokens.ids
    z_of = [collect_z(model, [ids[n + i]])[1][:, 0] for i in range(n)]  # [layer, position, head, d_head] each
    first = torch.stack([z[:, 0] for z in z_of]).mean(0)
    later = torch.cat([z[:, 1:] for z in z_of], 1).mean(1)
    out = []
    for i in range(n):

        def edit(layer, z):
            z = z.clone()
            for h in range(model.cfg.n_heads):
                for p in range(z.shape[1]):
                    if (layer, h) not in kept:
                        mean = later if p else first
                        new = dict(zero=0 * first, mean=mean, resample=z_of[i][:, p])[ablation]
                        z[0, p, h] = new[layer, h]
            return z

        out.append(bound.measure(METRIC, run_edited(model, [ids[i]], edit), [i]).item())
    return np.array(out)


def test_sets_are_the_literal_sets(tiny):
    sets = {(0, 1), (1, 0), (1, 3), (2, 2)}, set()
    rows = np.array([[h in kept for h in all_heads(3, 4)] for kept in sets])
    found, _ = measure_sets(tiny, sets=rows, ablations=ABLATIONS)
    for a, ablation in enumerate(ABLATIONS):
        for s, kept in enumerate(sets):
            close(found[a, s], literal_set(tiny, kept, ablation))


def test_sets_that_start_at_the_first_difference_are_the_literal_sets(bound):
    few = bound.take(3)
    kept = {(0, 1), (1, 3), (2, 2)}
    rows = np.array([[h in kept for h in all_heads(3, 4)]])
    assert all(batch.start > 1 for batch in pair_batches(few, pad=False))
    close(measure_sets(few, sets=rows, ablations=['resample'])[0][0, 0], literal_set(few, kept, 'resample'))


def test_sets_that_share_rows_are_the_sets_run_apart(bound, monkeypatch):
    "Sets that begin alike share rows; the figures are those without shared rows."
    few = bound.take(2)
    rows = np.random.default_rng(0).random((8, few.model.cfg.n_layers, few.model.cfg.n_heads)) < 0.6
    rows[0], rows[1], rows[2:5, 0], rows[4:6, 1], rows[6, :2] = True, False, True, False, True
    n_rows = sum(len(parents) for parents, _ in branch_rows(rows)[0])
    assert n_rows < 0.85 * rows.shape[0] * rows.shape[1]
    flat = rows.reshape(len(rows), -1)
    together, negative = measure_sets(few, None, flat, ['resample', 'zero'])
    monkeypatch.setattr(verify, 'can_branch', lambda mid: False)
    apart, again = measure_sets(few, None, flat, ['resample', 'zero'])
    close(apart, together)
    close(again, negative)


def test_clean_passes_are_kept_between_calls(bound, monkeypatch):
    "A second call with other sets runs no clean pass; a task of several batches is not kept."
    few, n = bound.take(4), bound.model.cfg.n_layers * bound.model.cfg.n_heads
    runs = []
    monkeypatch.setattr(verify, 'clean_pass', lambda *args: runs.append(1) or clean_pass(*args))
    measure = verify.SetMeasure(few)
    first = measure.run(np.ones((1, n), dtype=bool))[0]
    n_runs = len(runs)
    second = measure.run(np.stack([np.zeros(n, dtype=bool), np.ones(n, dtype=bool)]))[0]
    assert len(runs) == n_runs == len(measure.batches) and (first[0, 0] == second[0, 1]).all()
    several = verify.SetMeasure(few, batch_size=2)
    several.run(np.ones((1, n), dtype=bool))
    assert not several.kept


def test_figures_are_the_formulas():
    "Faithfulness, completeness and minimality by their definitions, for half of a planted circuit."
    p = plant('induction', seed=1, n=4, n_layers=3, n_heads=4, copies=2)
    bound = bind_task(p.model, p.task)
    everything = set(all_heads(3, 4))
    circuit = {min(p.truth), max(p.truth)}
    cache = {}

    def m(kept):
        key = frozenset(kept)
        if key not in cache:
            cache[key] = literal_set(bound, kept, 'resample').mean()
        return cache[key]

    def F(kept):
        return (m(kept) - m(set())) / (m(everything) - m(set()))

    found = verify_circuit(bound, circuit=circuit, n_random=1, n_subsets=4)  # 4: every subset of two heads
    close(found.faithfulness[0], F(circuit))
    close(found.left[0], F(everything - circuit))
    parts = set(), {min(circuit)}, {max(circuit)}, circuit
    close(found.incompleteness[0], np.mean([abs(F(everything - part) - F(circuit - part)) for part in parts]))
    close(found.minimality[0], [F(circuit) - F(circuit - {h}) for h in found.heads])


def test_saved_effects_come_back_as_they_were(tiny, tmp_path):
    effects = patch_heads(tiny)
    edges = patch_paths(tiny, heads=['L0H1', 'L1H0', 'L2H2'])
    effects.save(tmp_path / 'effects.safetensors')
    edges.save(tmp_path / 'edges.safetensors')
    assert load_scores(tmp_path / 'effects.safetensors').ranked() == effects.ranked()
    assert load_scores(tmp_path / 'edges.safetensors').ranked_inputs() == edges.ranked_inputs()
    with refuses('wrong-file'):
        HeadEffects.load(tmp_path / 'edges.safetensors')


@pytest.mark.parametrize('task', ['ioi', 'greater_than', 'docstring', 'induction'])
def test_effects_of_the_package_are_readable(task):
    effects = HeadEffects.load(effects_file(task))
    assert effects.done and len(effects) == 270
    assert list(effects.reference()) == list(reference(task, model='smollm2-135m'))


@pytest.mark.parametrize('task', ['ioi', 'induction'])
def test_edges_of_the_package_are_readable(task):
    edges = PathEffects.load(effects_file(task).parent / f'{task}-edges.json')
    assert edges.reference() == reference_edges(task, model='smollm2-135m')


@pytest.mark.parametrize('metric', ['logit_diff', 'kl_div'])
def test_confirmed_effects_are_those_of_patching(tiny, metric):
    "Every patched head has the effect that `patch_heads` measures, with and without answers."
    whole = patch_heads(tiny, metric=metric)
    found = new_effects(whole.made_from)
    wanted = np.arange(len(whole)) % 5 == 0
    for batch in pair_batches(tiny):
        passes = PatchPasses(tiny, batch, Substitutes(tiny, 'resample'))
        passes.measure_clean(found, pair_metric(metric))
        assert sum(passes.measure_heads(found, pair_metric(metric), wanted)) == len(batch.pairs) * wanted.sum()
    close(found.patched[:, wanted], whole.patched[:, wanted])
    close(found.corrupted, whole.corrupted)
    assert np.isnan(found.patched[:, ~wanted]).all()


def count_operators(function):
    "Return how many operators a call dispatches, and what it returns."
    with OperatorCount() as counter:
        found = function()
    return counter.n, found


class OperatorCount(TorchDispatchMode):
    "Count operators."

    n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.n += 1
        return function(*args, **(kwargs or {}))


def test_patching_every_head_takes_fewer_operators_than_forward_passes_of_its_rows(tmp_path):
    "The rows of 270 heads, in as many batches as patching makes, with all layers and positions: at most 1.3 times."
    size = dict(vocab_size=len(tokenizer), hidden_size=72, intermediate_size=96, num_hidden_layers=30)
    config = LlamaConfig(**size, num_attention_heads=9, num_key_value_heads=3, head_dim=8)
    bound = bind_task(save_random_model(config, tmp_path, device='cpu'), ioi_task(n=12))
    effects = new_effects(effects_record(bound, 'resample', 'all', 'logit_diff'))
    reruns(bound.model)  # tried once for each model
    batches = pair_batches(bound)
    one = count_operators(lambda: run(bound.model, batches[0].positives, lengths=batches[0].lengths[0]))[0]

    def patch_all():
        n_passes = 0
        for batch in batches:
            passes = PatchPasses(bound, batch, Substitutes(bound))
            passes.measure_clean(effects, pair_metric('logit_diff'))
            n_passes += len(list(passes.measure_heads(effects, pair_metric('logit_diff'), np.ones(270, dtype=bool))))
        return n_passes

    operators, n_passes = count_operators(patch_all)
    assert np.isfinite(effects.patched).all()
    assert operators <= 1.3 * n_passes * one
    assert n_passes <= 12 * 270 / 128  # at least 128 rows in a forward pass
