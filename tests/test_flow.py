"The difference flow goes through every architecture, loses nothing on the way, and agrees with gradients."

import numpy as np
import pytest
import torch
from transformers import (
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    Olmo2Config,
    PhiConfig,
    Qwen3Config,
)

from circuit_sae.codes.activations import cache_head_acts
from circuit_sae.core import refuses
from circuit_sae.data.batches import bind_task, pair_batches
from circuit_sae.data.prompts import induction_task, ioi_task, tiny_tokenizer
from circuit_sae.data.tasks import Task
from circuit_sae.models.forward import run
from circuit_sae.models.load import save_random_model, tiny_model
from circuit_sae.score.attribution import z_gradients
from circuit_sae.score.flow import Flow, check_flow, difference_flow, flow_record

D_VOCAB = len(tiny_tokenizer())
SHAPE = dict(vocab_size=D_VOCAB, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4)
GQA = dict(SHAPE, num_key_value_heads=2)  # two heads share a key and a value
ARCHITECTURES = dict(
    gpt2=GPT2Config(vocab_size=D_VOCAB, n_embd=48, n_layer=3, n_head=4, n_positions=256),
    llama=LlamaConfig(**GQA),
    qwen3=Qwen3Config(**GQA, head_dim=16),  # norms of queries and keys
    neox=GPTNeoXConfig(**SHAPE),  # parallel attention and MLP, two norms
    phi=PhiConfig(**SHAPE),  # parallel, one norm
    cohere=CohereConfig(**GQA),  # parallel, one norm, gated MLP
    gemma2=Gemma2Config(**GQA, head_dim=16, sliding_window=64),  # norms before and after attention and MLP
    olmo2=Olmo2Config(**GQA),  # norms after attention and MLP only
    granite=GraniteConfig(**GQA, residual_multiplier=0.22),  # scaled writes
)
architectures = pytest.mark.parametrize('name', ARCHITECTURES)


def random_model(name, folder):
    return save_random_model(ARCHITECTURES[name], folder, noise=0.05, device='cpu')


def by_gradients(bound):
    "Return the first-order attribution of each head, mean of the gradients at both prompts, [pair, head]."
    model = bound.model
    out = np.zeros((bound.n, model.cfg.n_layers * model.cfg.n_heads))
    for batch in pair_batches(bound, 8, pad=False):
        moved = run(model, batch.positives).softmax(-1) - run(model, batch.negatives).softmax(-1)

        def metric(logits, moved=moved):
            return (logits * moved).sum(-1)

        m, z, g = z_gradients(model, batch.positives, metric)
        m_neg, z_neg, g_neg = z_gradients(model, batch.negatives, metric)
        effect = ((z - z_neg) * (g + g_neg) / 2).sum((2, 4))
        out[batch.pairs] = (effect / (m - m_neg)[:, None]).transpose(0, 1).flatten(1)
    return out


@architectures
def test_every_architecture(name, tmp_path):
    bound = bind_task(random_model(name, tmp_path), induction_task(n=12))
    flow = difference_flow(bound, edges=True)
    np.testing.assert_allclose(flow.arrived, 1, atol=5e-3)
    # Random models are far from linear: most correlations are above .9, the one of OLMo 2 is the smallest.
    assert np.corrcoef(by_gradients(bound).ravel(), flow.by_pair.ravel())[0, 1] > 0.6
    layer = np.repeat(np.arange(3), 4)
    assert not flow.edges.values[layer[:, None] >= layer[None]].any()
    assert flow.edges.values.any()


@architectures
def test_padding_changes_nothing(name, tmp_path):
    "Pairs of different lengths in one pass give the same flow and activations as each pair alone."
    bound = bind_task(random_model(name, tmp_path), ioi_task(n=5))
    assert len({len(ids) for ids in bound.tokens.ids}) > 2
    acts = cache_head_acts(bound.model, bound.task)
    flow = difference_flow(bound, edges=True)
    for i, example in enumerate(bound.task.examples):
        alone = Task('alone', [example] * 2)
        z = cache_head_acts(bound.model, alone).z
        torch.testing.assert_close(acts.z[[i, i + 5]], z[[0, 2]], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(flow.by_pair[i], difference_flow(bound.model, alone).by_pair[0], atol=2e-3)


def test_unsupported_layers_are_refused(tmp_path):
    model = save_random_model(MixtralConfig(**GQA, num_local_experts=4), tmp_path, device='cpu')
    with refuses('unsupported-layer'):
        check_flow(model)
    with refuses('unsupported-layer'):
        difference_flow(model, induction_task(n=6))


def test_find_circuit_without_flow(tmp_path):
    from circuit_sae.find import find_circuit

    model = save_random_model(MixtralConfig(**GQA, num_local_experts=4), tmp_path, device='cpu')
    with refuses('unsupported-layer'):
        find_circuit(model, induction_task(n=6))
    assert find_circuit(model, induction_task(n=6), score='unique codes', n_epochs=5, n_train=4).flow is None


def test_lost_attribution_warns(monkeypatch):
    "A layer that the flow gets wrong is noticed, because the attribution at the embeddings is not 1."
    import circuit_sae.score.flow as module

    through_mlp = module.through_mlp
    monkeypatch.setattr(module, 'through_mlp', lambda *args: 40 * through_mlp(*args))
    with pytest.warns(UserWarning, match='Do not trust its scores'):
        difference_flow(tiny_model(), induction_task(n=4))


def test_older_files_and_names(tmp_path):
    "Files with the tensors `credit` and `left` load, and the older names of attributes work."
    bound = bind_task(tiny_model(), induction_task(n=4))
    flow = difference_flow(bound, edges=True)
    flow.save(tmp_path / 'flow.safetensors')
    again = Flow.load(tmp_path / 'flow.safetensors')
    assert (again.by_position == flow.by_position).all() and (again.arrived == flow.arrived).all()
    assert (again.between == flow.edges.values).all()
    assert again.made_from == flow_record(bound)
    assert again.ranked(1)[0][1] == flow.signed[flow.order()[0]] == again[again.ranked(1)[0][0]]


def test_pairs_are_taken_from_the_first_on():
    bound = bind_task(tiny_model(), induction_task(n=6))
    few, all_pairs = difference_flow(bound, n=3), difference_flow(bound)
    np.testing.assert_allclose(few.by_pair, all_pairs.by_pair[:3], atol=1e-5)
    assert few.made_from == flow_record(bound, 3) != all_pairs.made_from
