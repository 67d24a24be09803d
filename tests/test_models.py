"Models of many kinds are right or refused: their heads, their weights, their folders, their threads."

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    FalconConfig,
    Gemma4TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    Qwen3_5TextConfig,
)

from circuit_sae.causal.patching import patch_heads
from circuit_sae.codes.activations import cache_head_acts
from circuit_sae.core import refuses, save_json
from circuit_sae.data.batches import bind_task
from circuit_sae.data.prompts import induction_task, tiny_tokenizer
from circuit_sae.data.tasks import Task
from circuit_sae.models.behaviour import check_behaviour, get_metric
from circuit_sae.models.forward import run
from circuit_sae.models.load import load_model, quietly, save_random_model, tiny_model
from circuit_sae.models.rerun import Midway, reruns, run_edited
from circuit_sae.models.support import FIT_STAGES, check_model, unfit_for
from circuit_sae.models.writes import attention_layers, head_shape, layer_heads, write_matrices

size = dict(vocab_size=len(tiny_tokenizer()), hidden_size=16, num_hidden_layers=3, max_position_embeddings=128)
heads = dict(size, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2)
llama = LlamaConfig(**heads, head_dim=4)
linear = dict(linear_key_head_dim=4, linear_num_key_heads=2, linear_num_value_heads=4, linear_value_head_dim=4)
latent = dict(kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4)
gemma4 = dict(hidden_size_per_layer_input=4, vocab_size_per_layer_input=size['vocab_size'], tie_word_embeddings=True)
sliding = ['sliding_attention', 'sliding_attention', 'full_attention']
long_rope = dict(rope_type='longrope', rope_theta=1e4, short_factor=[1.0, 1.0], long_factor=[3.0, 7.0], factor=4.0)
KINDS = dict(
    latent=DeepseekV2Config(**heads | dict(num_key_value_heads=4), **latent, q_lora_rank=None, v_head_dim=8),
    latent_query=DeepseekV2Config(**heads | dict(num_key_value_heads=4), **latent, q_lora_rank=8, v_head_dim=12),
    hybrid=Qwen3_5TextConfig(**heads, **linear, head_dim=8, layer_types=['linear_attention'] * 2 + ['full_attention']),
    hybrid_first=Qwen3_5TextConfig(
        **heads, **linear, head_dim=8, layer_types=['full_attention', 'linear_attention', 'linear_attention']
    ),
    by_layer=Gemma4TextConfig(
        **heads, **gemma4, head_dim=8, global_head_dim=16, layer_types=sliding, sliding_window=64
    ),
    shared=Gemma4TextConfig(
        **heads, **gemma4, head_dim=8, layer_types=[sliding[0], sliding[2], sliding[2]], num_kv_shared_layers=1
    ),
    experts=MixtralConfig(**heads, num_local_experts=3),
    sinks=GptOssConfig(**heads, head_dim=8, num_local_experts=3, num_experts_per_tok=2, layer_types=sliding),
    post_norm=OPTConfig(**size, ffn_dim=32, num_attention_heads=4, word_embed_proj_dim=8, do_layer_norm_before=False),
)
KINDS['latent'].first_k_dense_replace = KINDS['latent_query'].first_k_dense_replace = 3


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A random Llama, saved."
    path = tmp_path_factory.mktemp('llama')
    save_random_model(llama, path)
    return path


def copy(folder, path, tensors=None, **config):
    "Copy a model with changes of its weights (name to tensor, None: removed) or its configuration."
    for p in folder.iterdir():
        (path / p.name).write_bytes(p.read_bytes())
    weights = load_file(path / 'model.safetensors') | (tensors or {})
    save_file({n: t.contiguous() for n, t in weights.items() if t is not None}, path / 'model.safetensors')
    save_json(path / 'config.json', json.loads((path / 'config.json').read_text()) | config)
    return path


def output_matrix(layer):
    "Return the module of a layer of a plain model that reads the heads' outputs, or None."
    attn = getattr(layer, 'self_attn', None)
    return getattr(attn, 'o_proj', None) or getattr(attn, 'out_proj', None)


def by_hand(folder, bound, layer, head, n_heads):
    "Patch one head of a plain model of `transformers` with its output on the negative; return the metric of each pair."
    with quietly():
        plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation='eager').eval()
    decoder = getattr(plain.model, 'decoder', plain.model)
    module = output_matrix(decoder.layers[layer])
    own = slice(head * module.in_features // n_heads, (head + 1) * module.in_features // n_heads)
    found = []
    for pair in range(bound.n):
        kept = []

        def keep(_, args, kept=kept):
            kept.append(args[0].clone())

        def swap(_, args, kept=kept):
            z = args[0].clone()
            z[..., own] = kept[0].view_as(z)[..., own]
            return (z,)

        for ids, hook in ((bound.tokens.ids[pair + bound.n], keep), (bound.tokens.ids[pair], swap)):
            handle = module.register_forward_pre_hook(hook)
            with torch.no_grad():
                logits = plain(torch.tensor([ids])).logits[:, -1]
            handle.remove()
        found.append(bound.measure(get_metric('logit_diff'), logits, [pair]).item())
    return np.array(found)


@pytest.mark.parametrize('kind', KINDS)
def test_patching_and_activations_of_every_kind(kind, tmp_path):
    model = save_random_model(KINDS[kind], tmp_path)
    bound = bind_task(model, induction_task(n=2))
    layers, shape = attention_layers(model), head_shape(model)
    effects = patch_heads(bound)
    for layer in {layers[0], layers[-1]}:
        wanted = by_hand(tmp_path, bound, layer, 1, layer_heads(model, layer).n)
        np.testing.assert_allclose(effects.patched[:, layer * 4 + 1], wanted, atol=1e-4)
        assert np.abs(wanted - effects.clean).max() > 1e-5
    acts = cache_head_acts(bound)
    assert tuple(acts.z.shape[1:]) == tuple(shape)
    for layer in set(range(shape.n_layers)) - set(layers):
        assert not acts.z[:, layer].any()
        np.testing.assert_allclose(effects.effect[layer * 4 : layer * 4 + 4], 0, atol=1e-5)


def test_shared_keys_allow_no_skipping(tmp_path):
    model = save_random_model(KINDS['shared'], tmp_path)
    ids = torch.arange(1, 9)[None]
    mid = Midway(model, ids)
    assert not reruns(model).skip
    torch.testing.assert_close(mid.rerun(2, [0], lambda z: 0 * z)[0], _zeroed(model, ids, 2)[0], rtol=0, atol=1e-4)


def _zeroed(model, ids, at):
    "Return the logits with the heads of one layer zeroed in the whole model."
    return run_edited(model, ids, lambda layer, z: 0 * z if layer == at else None)


def test_head_sizes_come_from_z(tmp_path):
    model = save_random_model(KINDS['latent'], tmp_path)
    assert model.cfg.d_head == 4 and write_matrices(model).shape == (3, 4, 8, 16)


# Weights


def test_a_prefix_of_all_names_is_refused(folder, tmp_path):
    weights = load_file(folder / 'model.safetensors')
    renamed = {f'_orig_mod.{name}': t for name, t in weights.items()} | dict.fromkeys(weights)
    with pytest.raises(ValueError, match='_orig_mod.') as e:
        load_model(copy(folder, tmp_path, renamed))
    assert e.value.code == 'weights-do-not-fit' and 'lm_head.weight' in str(e.value)


@pytest.mark.parametrize('missing', ['lm_head.weight', 'model.layers.1.mlp.up_proj.weight', 'model.norm.weight'])
def test_a_missing_weight_is_named(folder, tmp_path, missing):
    with pytest.raises(ValueError, match=missing) as e:
        load_model(copy(folder, tmp_path, {missing: None}))
    assert e.value.code == 'weights-do-not-fit'


def test_a_file_with_more_layers_than_the_configuration_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match='model.layers.2.') as e:
        load_model(copy(folder, tmp_path, num_hidden_layers=2))
    assert e.value.code == 'weights-do-not-fit'


def test_an_unknown_weight_and_a_wrong_shape_are_refused(folder, tmp_path):
    with refuses('weights-do-not-fit'):
        load_model(copy(folder, tmp_path, {'score.weight': torch.ones(2, 16)}))
    with pytest.raises(ValueError):
        load_model(copy(folder, tmp_path, {'score.weight': None, 'model.norm.weight': torch.ones(15)}))


def test_buffers_and_tied_heads_are_not_refused(folder, tmp_path):
    buffers = {f'model.layers.{i}.self_attn.rotary_emb.inv_freq': torch.ones(2) for i in range(3)}
    load_model(copy(folder, tmp_path, buffers))
    load_model(copy(folder, tmp_path, {'lm_head.weight': None}, tie_word_embeddings=True))


# Variants that TransformerLens computes wrongly or not at all


@pytest.mark.parametrize('n_kv', [2, 4])
def test_grouped_fused_queries_are_refused(n_kv, tmp_path):
    config = FalconConfig(
        vocab_size=size['vocab_size'],
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_kv_heads=n_kv,
        new_decoder_architecture=True,
    )
    with refuses('unsupported-model'):
        save_random_model(config, tmp_path)


def test_a_model_without_attention_is_refused_at_every_stage(tmp_path):
    mamba = save_random_model(MambaConfig(**{k: size[k] for k in list(size)[:3]}), tmp_path)
    for stage in FIT_STAGES:
        with refuses('unsupported-model'):
            check_model(mamba, stage)
    with refuses('unsupported-model'):
        cache_head_acts(mamba, induction_task(n=2))


@pytest.mark.parametrize('given', ['smollm2-135m', None, tiny_tokenizer()])
def test_what_is_no_model_is_refused(given):
    with refuses('not-a-model'):
        check_model(given, 'flow')


def test_stages_of_a_plain_model(folder):
    model = load_model(folder)
    assert not any(unfit_for(model, stage) for stage in FIT_STAGES)


# Prompts


def test_positions_run_out(tmp_path):
    model = save_random_model(
        GPT2Config(vocab_size=size['vocab_size'], n_embd=16, n_layer=2, n_head=4, n_positions=16), tmp_path
    )
    bound = bind_task(model, induction_task(n=2))
    longest = max(map(len, bound.tokens.ids))
    with pytest.raises(ValueError, match=f'16 positions.* {longest} tokens'):
        check_model(bound, 'flow')
    for call in (check_model, check_behaviour, patch_heads):
        with refuses('too-many-tokens'):
            call(bound, *['flow'] * (call is check_model))


@pytest.mark.parametrize('call', [check_behaviour, patch_heads, cache_head_acts])
def test_overflow_names_the_layer(folder, tmp_path, call):
    big = {'model.layers.1.mlp.down_proj.weight': torch.full((16, 32), 6e4)}
    model = load_model(copy(folder, tmp_path, big), dtype='float16')
    with pytest.raises(ValueError, match='layer 1.*float16.*bfloat16') as e:
        call(model, induction_task(n=2))
    assert e.value.code == 'not-finite'


@pytest.mark.parametrize('kind', ['longrope', 'dynamic'])
def test_the_rotary_angles_do_not_depend_on_the_batch(kind, tmp_path):
    if kind == 'longrope':
        rope = long_rope | dict(original_max_position_embeddings=12)
        config = Phi3Config(**heads, rope_parameters=rope, pad_token_id=0)
    else:
        rope = dict(rope_type='dynamic', rope_theta=1e4, factor=4.0)
        config = LlamaConfig(**heads | dict(max_position_embeddings=12), rope_parameters=rope)
    model = save_random_model(config, tmp_path)
    rows = [list(range(1, 9)), list(range(5, 25)), list(range(3, 15))]
    padded = np.stack([np.pad(r, (0, 20 - len(r)), 'edge') for r in rows])
    together = run(model, padded, lengths=[len(r) for r in rows])
    for row, logits in zip(rows, together):
        torch.testing.assert_close(logits, run(model, [row])[0], rtol=0, atol=1e-5)


# Threads


def test_two_threads_take_turns():
    model = tiny_model(n_layers=3)
    examples = induction_task(n=24).bind(model).examples
    tasks = [Task('one', examples[:12]), Task('two', examples[12:])]
    calls = [lambda t: patch_heads(model, t).effect, lambda t: cache_head_acts(model, t).z.numpy()]
    for call in calls:
        alone = [call(t) for t in tasks]
        with ThreadPoolExecutor(2) as pool:
            for found, wanted in zip(pool.map(call, tasks * 3), alone * 3):
                np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_hooks_of_another_thread_wait():
    model = tiny_model()
    seen = []
    with ThreadPoolExecutor(1) as pool:
        with model.hooks(fwd_hooks=[('blocks.0.attn.hook_z', lambda z, hook: seen.append(1))]):
            other = pool.submit(run, model, [[1, 2, 3]])
            run(model, [[1, 2, 3]])
            assert not other.done()
        other.result()
    assert seen == [1]


# Adapters


def save_adapter(path, base, rank=2, **config):
    "Write a random adapter of the query and down projections, and return what it adds by parameter."
    g = torch.Generator().manual_seed(0)
    tensors, added = {}, {}
    for module, (n_out, n_in) in {'self_attn.q_proj': (16, 16), 'mlp.down_proj': (16, 32)}.items():
        A, B = torch.randn(rank, n_in, generator=g), torch.randn(n_out, rank, generator=g)
        name = f'model.layers.1.{module}'
        tensors |= {f'base_model.model.{name}.lora_A.weight': A, f'base_model.model.{name}.lora_B.weight': B}
        added[f'{name}.weight'] = 4 * B @ A
    save_file(tensors, path / 'adapter_model.safetensors')
    info = dict(peft_type='LORA', r=rank, lora_alpha=4 * rank, base_model_name_or_path=str(base)) | config
    save_json(path / 'adapter_config.json', info)
    return added


@pytest.mark.parametrize('together', [True, False])
def test_an_adapter_is_added_to_its_base(folder, tmp_path, together):
    path = copy(folder, tmp_path) if together else tmp_path
    added = save_adapter(path, folder)
    weights = load_file(folder / 'model.safetensors')
    found = dict(load_model(path).original_model.state_dict())
    for name, change in added.items():
        module, _, own = name.rpartition('.')
        keys = [key for key in found if key.replace('_original_component.', '').endswith(name)]
        assert keys
        torch.testing.assert_close(found[keys[0]], weights[name] + change)


def test_adapters_that_do_not_fit_are_refused(folder, tmp_path):
    save_adapter(tmp_path, folder, use_dora=True)
    with refuses('adapter-kind'):
        load_model(tmp_path)
    save_adapter(tmp_path, '/no/such/base')
    with refuses('no-adapter-base'):
        load_model(tmp_path)


# Before anything heavy is imported


@pytest.mark.parametrize(
    'make, code',
    [
        (
            lambda p: (p / 'model.safetensors').write_bytes(b'version https://git-lfs.github.com/spec/v1\n'),
            'git-lfs-pointer',
        ),
        (
            lambda p: (p / 'model.safetensors').write_bytes((p / 'model.safetensors').read_bytes()[:4000]),
            'damaged-weights',
        ),
        (lambda p: (p / 'tokenizer.json').unlink(), 'no-tokenizer'),
        (lambda p: save_json(p / 'config.json', dict(model_type='t5', is_encoder_decoder=True)), 'unsupported-model'),
        (lambda p: save_json(p / 'config.json', dict(quantization_config=dict(quant_method='aqlm'))), 'packed-weights'),
        (lambda p: (p / 'config.json').unlink(), 'no-such-model'),
    ],
)
def test_damaged_folders_are_refused(folder, tmp_path, make, code):
    make(copy(folder, tmp_path))
    with refuses(code):
        load_model(tmp_path)


def test_folders_are_checked_without_torch(tmp_path):
    code = (
        'import sys; from circuit_sae.models.folders import check_name\n'
        'try: check_name(sys.argv[1])\n'
        'except ValueError as e: print(e.code, {"torch", "transformers", "transformer_lens"} & set(sys.modules))'
    )
    (tmp_path / 'models').mkdir()
    for name in (tmp_path, tmp_path / 'modells', '~/no/such', 'C:\\no'):
        r = subprocess.run([sys.executable, '-c', code, str(name)], capture_output=True, text=True)
        assert r.stdout.split(' ', 1)[1] == 'set()\n', r.stderr
    with pytest.raises(ValueError, match="models'"):
        load_model(tmp_path / 'modells')
