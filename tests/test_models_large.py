"A model whose layers are partly on disk is, to every room, the same model."
import numpy as np, pytest, torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig
from circuit_sae.core import InputError
from circuit_sae.data.tasks import Encoder
from circuit_sae.data.prompts import ioi_task
from circuit_sae.models.load import auto_dtype, check_writes, load_model, model_identity, run, run_pairs, tiny_tokenizer, write_matrices
from circuit_sae.codes.activations import cache_head_acts
from circuit_sae.find import find_circuit

CONFIGS = dict(llama=LlamaConfig, gemma2=Gemma2Config) # Gemma 2: a norm after attention, and the output weights tied to the embedding

def spread(embed, layers):
    "A device map: where the embedding and the output weights go, and where each layer."
    return {'model.embed_tokens': embed, 'lm_head': embed, 'model.norm': 'cpu', 'model.rotary_emb': 'cpu', **{f'model.layers.{l}': p for l, p in enumerate(layers)}}

SOME, MOST = spread('cpu', ['cpu', 'disk', 'disk', 'cpu']), spread('disk', ['disk']*4)

@pytest.fixture(autouse=True, scope='module')
def one_thread():
    n = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

@pytest.fixture(scope='module', params=CONFIGS)
def folder(request, tmp_path_factory):
    "A random model of four layers, saved."
    d, tokenizer = tmp_path_factory.mktemp(request.param), tiny_tokenizer()
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(CONFIGS[request.param](vocab_size=len(tokenizer), hidden_size=48, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=256))
    with torch.no_grad():
        for p in hf.parameters(): p.add_(torch.randn_like(p)*.1)
    hf.save_pretrained(d); tokenizer.save_pretrained(d)
    return d

@pytest.fixture(scope='module')
def whole(folder): return load_model(str(folder), device='cpu')

@pytest.fixture(scope='module', params=[SOME, MOST], ids=['some', 'most'])
def large(request, folder, tmp_path_factory):
    "The same with layers on disk."
    model = load_model(str(folder), device_map=request.param, offload_folder=tmp_path_factory.mktemp('disk'))
    assert on_disk(model) == (2 if request.param is SOME else 4)
    return model

def on_disk(model):
    "How many blocks have no weight in memory."
    return sum(all(p.is_meta for p in b.parameters()) for b in model.blocks)

def test_the_room_gives_the_same(large, whole):
    before, task = on_disk(large), ioi_task(n=8)
    _, ids, others = next(task.tokens(whole).pairs(8))
    torch.testing.assert_close(write_matrices(large), write_matrices(whole), rtol=0, atol=0)
    assert model_identity(large) == model_identity(whole)
    assert check_writes(large) == pytest.approx(check_writes(whole), abs=1e-5)
    assert Encoder(large).bos == Encoder(whole).bos
    assert large.to_tokens('When Mary and John').tolist() == whole.to_tokens('When Mary and John').tolist()
    for a, b in zip(run_pairs(large, ids, others), run_pairs(whole, ids, others)): torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert on_disk(large) == before # nothing stayed

def test_the_circuit_is_the_same(large, whole):
    found = [find_circuit(m, ioi_task(n=20), n_epochs=5) for m in (large, whole)]
    a, b = (f.acts for f in found)
    torch.testing.assert_close(a.z, b.z, rtol=0, atol=1e-5)
    torch.testing.assert_close(a.W, b.W, rtol=0, atol=0)
    assert a.made_from == b.made_from
    np.testing.assert_allclose(a.behaviour.judged, b.behaviour.judged, rtol=0, atol=1e-5)
    assert (found[0].codes.values == found[1].codes.values).all() and found[0].circuit == found[1].circuit

def test_one_layer_at_a_time(large, monkeypatch):
    "Of what is on disk, at most one block is in memory at once, whatever is asked."
    from accelerate.hooks import AlignDevicesHook
    back, most, blocks = AlignDevicesHook.post_forward, [0], list(large.blocks)
    def here(): return sum(any(not p.is_meta for p in b.parameters()) for b in blocks)
    start = here()
    def count(hook, module, output): most[0] = max(most[0], here() - start); return back(hook, module, output)
    monkeypatch.setattr(AlignDevicesHook, 'post_forward', count)
    write_matrices(large); model_identity(large); check_writes(large); cache_head_acts(large, ioi_task(n=2))
    assert most[0] == 1

def test_half_precision_and_auto(folder):
    large, whole = load_model(str(folder), dtype='bfloat16', device_map=SOME), load_model(str(folder), dtype='bfloat16', device='cpu')
    assert model_identity(large) == model_identity(whole)
    torch.testing.assert_close(write_matrices(large), write_matrices(whole), rtol=0, atol=0)
    auto = load_model(str(folder), dtype='auto', device='cpu')
    assert {str(p.dtype) for p in auto.original_model.parameters()} == {f"torch.{auto_dtype('cpu')}"}

@pytest.mark.parametrize('says,dtype', [({'avx512_bf16': True}, 'bfloat16'), ({'amx_bf16': True}, 'bfloat16'), ({'architecture': 'aarch64', 'bf16': True}, 'bfloat16'),
                                        ({'avx512_bf16': False, 'avx512_f': True}, 'float32'), ({}, 'float32'), (None, 'float32')])
def test_auto_asks_the_processor(monkeypatch, says, dtype):
    if says is None: monkeypatch.delattr(torch.cpu, 'get_capabilities', raising=False) # an older torch
    else: monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: says, raising=False)
    assert auto_dtype('cpu') == dtype

@pytest.mark.parametrize('native', [True, False])
def test_auto_asks_the_gpu(monkeypatch, native):
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: native or including_emulation)
    assert auto_dtype('cuda') == ('bfloat16' if native else 'float32')
    assert auto_dtype('mps') == 'float32'

def test_what_cannot_be_is_said(folder):
    with pytest.raises(InputError, match='either device='): load_model(str(folder), device='cpu', device_map=SOME)
    with pytest.raises(InputError, match='legacy=False'): load_model(str(folder), legacy=True, device_map=SOME)
    with pytest.raises(InputError, match='device_map'): load_model(str(folder), device_map={**SOME, 'model.layers.0': 0})

def test_a_model_without_attention_is_refused(tmp_path):
    from transformers import MambaConfig, MambaForCausalLM
    tokenizer = tiny_tokenizer()
    model = MambaForCausalLM(MambaConfig(vocab_size=len(tokenizer), hidden_size=32, state_size=8, num_hidden_layers=2))
    model.save_pretrained(tmp_path); tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match='no attention'): cache_head_acts(load_model(str(tmp_path)), ioi_task(n=4))
