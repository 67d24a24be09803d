"Interventions on models of other makes: reruns, patching and paths agree with the whole model run from its first layer."
import numpy as np, pytest, torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, GPTNeoXConfig, GraniteConfig, LlamaConfig, Olmo2Config
from circuit_sae.models.behaviour import get_metric
from circuit_sae.models.load import quietly, load_model, run, tiny_tokenizer
from circuit_sae.causal.patching import Substitutes, pair_buckets, patch_heads
from circuit_sae.causal.paths import patch_paths
from circuit_sae.score.attribution import attribute_heads
from circuit_sae.data.prompts import ioi_task
from circuit_sae.models.rerun import Midway, collect_z, run_edited

tokenizer = tiny_tokenizer()
gqa = dict(vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
           max_position_embeddings=256)
CONFIGS = dict(gpt2=GPT2Config(vocab_size=len(tokenizer), n_embd=48, n_layer=3, n_head=4, n_positions=256), llama=LlamaConfig(**gqa),
               gemma2=Gemma2Config(**gqa, sliding_window=8), olmo2=Olmo2Config(**gqa), granite=GraniteConfig(**gqa, residual_multiplier=.3),
               neox=GPTNeoXConfig(vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=256))

@pytest.fixture(scope='module', params=CONFIGS)
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(CONFIGS[request.param])
    for p in hf.parameters(): torch.nn.init.normal_(p, std=.3) if p.ndim > 1 else None
    with quietly(): hf.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_model(str(folder))

@pytest.fixture(scope='module')
def task(): return ioi_task(n=5, seed=3)

@pytest.mark.parametrize('ablation', ['resample', 'mean', 'zero'])
def test_patching_is_the_literal_patching(model, task, ablation):
    effects, tokens, subs = patch_heads(model, task, ablation, batch_size=7), task.tokens(model), Substitutes(model, task, ablation)
    for pairs, positives, negatives in pair_buckets(model, task):
        z_in = subs(negatives)[1]
        for layer, head in ((0, 1), (1, 3), (2, 0)):
            def edit(l, z):
                if l == layer: z = z.clone(); z[:, :, head] = z_in[layer][:, :, head]; return z
            want = get_metric('logit_diff')(run_edited(model, positives, edit), [tokens.answers[i] for i in pairs], [tokens.wrongs[i] for i in pairs])
            np.testing.assert_allclose(effects.patched[pairs, layer*4 + head], want, atol=1e-4*max(1, abs(want).max()))

def test_order_and_batches_change_nothing(model, task):
    one = patch_heads(model, task)
    other = patch_heads(model, task._with(task.bind(model).examples[::-1]), batch_size=1)
    np.testing.assert_allclose(other.patched[::-1], one.patched, atol=1e-4*max(1, np.abs(one.patched).max()))

def test_a_rerun_leaves_the_model_as_it_was(model, task):
    pairs, positives, _ = next(pair_buckets(model, task))
    before = run(model, positives)
    with pytest.raises(RuntimeError): Midway(model, positives).rerun(1, torch.arange(len(pairs)), lambda z: z[:, :, :1])
    assert torch.equal(run(model, positives), before)

def test_paths_and_attribution_run(model, task):
    edges = patch_paths(model, task, ['L0H0', 'L1H1', 'L2H3'])
    assert len(edges) == 3 and np.isfinite(edges.effect).all() and (edges.size > 0).all()
    assert np.isfinite(attribute_heads(model, task, steps=2)).all()

def test_gradient_is_the_slope_of_patching(model, task):
    "A head patched a little of the way moves the metric by as much of its attribution."
    from circuit_sae.score.attribution import _attribute
    tokens, (pairs, positives, negatives) = task.tokens(model), next(pair_buckets(model, task))
    measure = lambda logits: tokens.measure(get_metric('logit_diff'), logits, pairs)
    effect, _ = _attribute(model, positives, negatives, measure, None)
    z_neg = collect_z(model, negatives)[1]
    def part_way(layer, head, share):
        def edit(l, z):
            if l == layer: z = z.clone(); z[:, :, head] += share*(z_neg[layer][:, :, head] - z[:, :, head]); return z
        return measure(run_edited(model, positives, edit)).double().sum().item()
    for layer, head in ((0, 2), (2, 1)):
        slope = (part_way(layer, head, -5e-3) - part_way(layer, head, 5e-3))/1e-2
        assert abs(slope - effect[layer*4 + head]) < .05*abs(effect).max() + 1e-2
