"The difference can be followed through every build of layer that models have, and what comes out is near what gradients say."
import numpy as np, pytest, torch
from transformers import (AutoModelForCausalLM, CohereConfig, Gemma2Config, GPT2Config, GPTNeoXConfig, GraniteConfig, LlamaConfig, MixtralConfig, Olmo2Config,
                          PhiConfig, Qwen3Config)
from circuit_sae.core import InputError
from circuit_sae.data.tasks import Task
from circuit_sae.data.prompts import induction_task, ioi_task
from circuit_sae.models.load import load_model, run, tiny_tokenizer
from circuit_sae.causal.patching import pair_buckets
from circuit_sae.score.attribution import z_gradients
from circuit_sae.codes.activations import cache_head_acts
from circuit_sae.score.flow import difference_flow
from circuit_sae.find import find_circuit

tokenizer = tiny_tokenizer()
shape = dict(vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=256)
gqa = dict(shape, num_key_value_heads=2)
BUILDS = dict(gpt2=GPT2Config(vocab_size=len(tokenizer), n_embd=48, n_layer=3, n_head=4, n_positions=256), llama=LlamaConfig(**gqa), qwen3=Qwen3Config(**gqa, head_dim=16),
    neox=GPTNeoXConfig(**shape), phi=PhiConfig(**shape), cohere=CohereConfig(**gqa),                     # side by side, with two norms or one
    gemma2=Gemma2Config(**gqa, head_dim=16, sliding_window=64), olmo2=Olmo2Config(**gqa),                # norms behind attention and MLP, with and without those before
    granite=GraniteConfig(**gqa, residual_multiplier=.22))                                               # writes scaled

def random_model(config, folder):
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in hf.parameters(): p.add_(torch.randn_like(p)*.05)
    hf.save_pretrained(folder); tokenizer.save_pretrained(folder)
    return load_model(str(folder), device='cpu')

def by_gradients(model, task):
    "Share of the change of the prediction that each head makes to first order, [pair, head]: mean of the gradients at both prompts."
    out = np.zeros((task.n, model.cfg.n_layers*model.cfg.n_heads))
    for pairs, pos, neg in pair_buckets(model, task, 8, answers=False):
        moved = run(model, pos).softmax(-1) - run(model, neg).softmax(-1)
        (m, z, g), (m_neg, z_neg, g_neg) = (z_gradients(model, ids, lambda logits: (logits*moved).sum(-1)) for ids in (pos, neg))
        out[pairs] = (((z - z_neg)*(g + g_neg)/2).sum((2, 4)) / (m - m_neg)[:, None]).transpose(0, 1).flatten(1)
    return out

@pytest.mark.parametrize('name', BUILDS)
def test_it_follows_every_build(name, tmp_path):
    model, task = random_model(BUILDS[name], tmp_path), induction_task(n=12)
    flow = difference_flow(model, task, edges=True)
    np.testing.assert_allclose(flow.left, 1, atol=5e-3)                                     # nothing is lost on the way, and nothing is gained
    assert np.corrcoef(by_gradients(model, task).ravel(), flow.by_pair.ravel())[0, 1] > .6 # a random model is far from linear: most are above .9, OLMo 2 is the last
    later = np.repeat(np.arange(3), 4)
    assert not flow.between[later[:, None] >= later[None]].any() and flow.between.any()

@pytest.mark.parametrize('name', BUILDS)
def test_filling_up_changes_nothing(name, tmp_path):
    "Pairs of different lengths in one pass come out as each of them by itself, activations and flow."
    model, task = random_model(BUILDS[name], tmp_path), ioi_task(n=5)
    assert len({len(ids) for ids in task.tokens(model).ids}) > 2
    acts, flow = cache_head_acts(model, task), difference_flow(model, task, edges=True)
    for i, example in enumerate(task.examples):
        alone = Task('alone', [example]*2)
        torch.testing.assert_close(acts.z[[i, i + 5]], cache_head_acts(model, alone).z[[0, 2]], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(flow.by_pair[i], difference_flow(model, alone).by_pair[0], atol=2e-3)

def test_it_refuses_what_it_cannot_follow(tmp_path):
    model, task = random_model(MixtralConfig(**gqa, num_local_experts=4), tmp_path), induction_task(n=6)
    with pytest.raises(InputError, match='layer 0 of this model .*MoEBridge.*unique codes'): find_circuit(model, task)
    assert find_circuit(model, task, score='unique codes', n_epochs=5, n_train=4).flow is None

def test_it_says_when_something_is_lost(monkeypatch):
    "A model that multiplies what heads write by something unknown to the sweep is told from one that does not."
    import circuit_sae.score.flow as room
    from circuit_sae.models.load import tiny_model
    model, task, through = tiny_model(), induction_task(n=4), room._through_mlp
    monkeypatch.setattr(room, 'through_mlp', lambda *a: 40*through(*a))
    with pytest.warns(UserWarning, match='Do not trust its scores'): difference_flow(model, task)
