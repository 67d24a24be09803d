"A model with layers on disk gives the same results as the model in memory."

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, LlamaConfig

from circuit_sae.codes.activations import cache_head_acts
from circuit_sae.core import refuses
from circuit_sae.data.batches import bind_task, pair_batches
from circuit_sae.data.prompts import ioi_task, tiny_tokenizer
from circuit_sae.data.tasks import Encoder
from circuit_sae.models.forward import check_writes, run_pairs
from circuit_sae.models.load import auto_dtype, load_model, model_identity, save_random_model
from circuit_sae.models.writes import write_matrices
from circuit_sae.score.flow import difference_flow

CONFIGS = dict(llama=LlamaConfig, gemma2=Gemma2Config)  # Gemma 2: a norm after attention, tied output weights
SHAPE = dict(hidden_size=48, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)


def spread(embed, layers):
    "Return a device map: where the embedding and the output weights go, and where each layer."
    ends = {'model.embed_tokens': embed, 'lm_head': embed, 'model.norm': 'cpu', 'model.rotary_emb': 'cpu'}
    return ends | {f'model.layers.{layer}': place for layer, place in enumerate(layers)}


SOME = spread('cpu', ['cpu', 'disk', 'disk', 'cpu'])
MOST = spread('disk', ['disk'] * 4)


@pytest.fixture(autouse=True, scope='module')
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture(scope='module', params=CONFIGS)
def folder(request, tmp_path_factory):
    "A random model of four layers, saved."
    d = tmp_path_factory.mktemp(request.param)
    config = CONFIGS[request.param](vocab_size=len(tiny_tokenizer()), head_dim=16, max_position_embeddings=256, **SHAPE)
    save_random_model(config, d, device='cpu')
    return d


@pytest.fixture(scope='module')
def whole(folder):
    return load_model(str(folder), device='cpu')


@pytest.fixture(scope='module', params=[SOME, MOST], ids=['some', 'most'])
def large(request, folder, tmp_path_factory):
    "The same model with layers on disk."
    model = load_model(str(folder), device_map=request.param, offload_folder=tmp_path_factory.mktemp('disk'))
    assert on_disk(model) == (2 if request.param is SOME else 4)
    return model


def on_disk(model):
    "Return how many blocks have no weight in memory."
    return sum(all(p.is_meta for p in block.parameters()) for block in model.blocks)


def test_writes_identity_and_logits_are_the_same(large, whole):
    before = on_disk(large)
    batch = pair_batches(bind_task(whole, ioi_task(n=8)), 8, pad=False)[0]
    torch.testing.assert_close(write_matrices(large), write_matrices(whole), rtol=0, atol=0)
    assert model_identity(large) == model_identity(whole)
    assert check_writes(large) == pytest.approx(check_writes(whole), abs=1e-5)
    assert Encoder(large).bos == Encoder(whole).bos
    assert large.to_tokens('When Mary and John').tolist() == whole.to_tokens('When Mary and John').tolist()
    pairs = [run_pairs(model, batch.positives, batch.negatives) for model in (large, whole)]
    for a, b in zip(*pairs):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert on_disk(large) == before  # no layer stayed in memory


def test_the_flow_is_the_same(large, whole):
    a, b = (difference_flow(model, ioi_task(n=4), edges=True) for model in (large, whole))
    np.testing.assert_allclose(a.by_position, b.by_position, rtol=0, atol=1e-5)
    np.testing.assert_allclose(a.edges.values, b.edges.values, rtol=0, atol=1e-5)


def test_the_circuit_is_the_same(large, whole):
    from circuit_sae.find import find_circuit

    found = [find_circuit(model, ioi_task(n=20), n_epochs=5) for model in (large, whole)]
    a, b = (f.acts for f in found)
    torch.testing.assert_close(a.z, b.z, rtol=0, atol=1e-5)
    torch.testing.assert_close(a.W, b.W, rtol=0, atol=0)
    assert a.made_from == b.made_from
    np.testing.assert_allclose(a.behaviour.judged, b.behaviour.judged, rtol=0, atol=1e-5)
    assert (found[0].codes.values == found[1].codes.values).all() and found[0].circuit == found[1].circuit


def test_one_layer_at_a_time(large, monkeypatch):
    "At most one block of the offloaded ones is in memory at a time."
    from accelerate.hooks import AlignDevicesHook

    post_forward = AlignDevicesHook.post_forward
    blocks, most = list(large.blocks), [0]

    def in_memory():
        return sum(any(not p.is_meta for p in block.parameters()) for block in blocks)

    start = in_memory()

    def count(hook, module, output):
        most[0] = max(most[0], in_memory() - start)
        return post_forward(hook, module, output)

    monkeypatch.setattr(AlignDevicesHook, 'post_forward', count)
    write_matrices(large)
    model_identity(large)
    check_writes(large)
    cache_head_acts(large, ioi_task(n=2))
    assert most[0] == 1


def test_half_precision_and_auto(folder):
    large = load_model(str(folder), dtype='bfloat16', device_map=SOME)
    whole = load_model(str(folder), dtype='bfloat16', device='cpu')
    assert model_identity(large) == model_identity(whole)
    torch.testing.assert_close(write_matrices(large), write_matrices(whole), rtol=0, atol=0)
    auto = load_model(str(folder), dtype='auto', device='cpu')
    assert {str(p.dtype) for p in auto.original_model.parameters()} == {f'torch.{auto_dtype("cpu")}'}


CAPABILITIES = [
    ({'avx512_bf16': True}, 'bfloat16'),
    ({'amx_bf16': True}, 'bfloat16'),
    ({'architecture': 'aarch64', 'bf16': True}, 'bfloat16'),
    ({'avx512_bf16': False, 'avx512_f': True}, 'float32'),
    ({}, 'float32'),
    (None, 'float32'),  # an older version of torch
]


@pytest.mark.parametrize('capabilities, dtype', CAPABILITIES)
def test_auto_asks_the_processor(monkeypatch, capabilities, dtype):
    if capabilities is None:
        monkeypatch.delattr(torch.cpu, 'get_capabilities', raising=False)
    else:
        monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: capabilities, raising=False)
    assert auto_dtype('cpu') == dtype


@pytest.mark.parametrize('native', [True, False])
def test_auto_asks_the_gpu(monkeypatch, native):
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: native or including_emulation)
    assert auto_dtype('cuda') == ('bfloat16' if native else 'float32')
    assert auto_dtype('mps') == 'float32'


def test_impossible_places_are_refused(folder):
    with refuses('device-and-map'):
        load_model(str(folder), device='cpu', device_map=SOME)
    with refuses('legacy-offloaded'):
        load_model(str(folder), legacy=True, device_map=SOME)
    with refuses('device-map'):
        load_model(str(folder), device_map={**SOME, 'model.layers.0': 0})


def test_a_model_without_attention_is_refused(tmp_path):
    from transformers import MambaConfig

    config = MambaConfig(vocab_size=len(tiny_tokenizer()), hidden_size=32, state_size=8, num_hidden_layers=2)
    model = save_random_model(config, tmp_path, noise=0)
    with refuses('unsupported-model'):
        cache_head_acts(model, ioi_task(n=4))
