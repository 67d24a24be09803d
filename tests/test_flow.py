"The difference flow is a discrete gradient on every architecture: complete, symmetric, and the gradient in the limit."

import numpy as np
import pytest
import torch
from transformers import (
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OlmoConfig,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
)

from circuit_sae.codes.activations import cache_head_acts
from circuit_sae.core import refuses, save_tensors
from circuit_sae.data.batches import bind_task
from circuit_sae.data.prompts import induction_task, ioi_task, tiny_tokenizer
from circuit_sae.data.tasks import Task
from circuit_sae.models.behaviour import logit_diff
from circuit_sae.models.forward import run
from circuit_sae.models.load import save_random_model, tiny_model
from circuit_sae.score.attribution import attribute_heads
from circuit_sae.score.flow import Flow, check_flow, difference_flow, flow_record

D_VOCAB = len(tiny_tokenizer())
N_LAYERS = 2
SHAPE = dict(vocab_size=D_VOCAB, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
GQA = dict(SHAPE, num_key_value_heads=2)  # two heads share a key and a value
OLD_SHAPE = dict(vocab_size=D_VOCAB, n_embd=48, n_layer=2, n_head=4, n_positions=256)
CAPS = dict(attn_logit_softcapping=1.0, final_logit_softcapping=2.0)  # low enough to matter
ARCHITECTURES = dict(
    gpt2=GPT2Config(**OLD_SHAPE),
    llama=LlamaConfig(**GQA),
    mistral=MistralConfig(**GQA, head_dim=12),
    qwen2=Qwen2Config(**GQA),  # biases of queries, keys and values
    qwen3=Qwen3Config(**GQA, head_dim=16),  # norms of queries and keys
    neox=GPTNeoXConfig(**SHAPE),  # parallel attention and MLP, two norms, a quarter of each head is rotated
    phi=PhiConfig(**SHAPE),  # parallel, one norm
    phi3=Phi3Config(**GQA, pad_token_id=0),  # fused matrices
    cohere=CohereConfig(**GQA, use_qk_norm=True),  # parallel, gated MLP, rotates neighbours, a gain for each head
    gemma2=Gemma2Config(**GQA, head_dim=16, sliding_window=64, **CAPS),  # norms before and after attention and MLP
    gemma3=Gemma3TextConfig(**GQA, head_dim=16, sliding_window=64),
    olmo2=Olmo2Config(**GQA),  # norms after attention and MLP only, norms of all queries and keys together
    granite=GraniteConfig(**GQA, residual_multiplier=0.22, attention_multiplier=0.3),  # scaled writes and scores
    opt=OPTConfig(**SHAPE, ffn_dim=96, word_embed_proj_dim=48, activation_function='gelu'),
    bloom=BloomConfig(vocab_size=D_VOCAB, hidden_size=48, n_layer=2, n_head=4),  # ALiBi
    gptj=GPTJConfig(**OLD_SHAPE, rotary_dim=8),  # rotates neighbours, shows no cosines
    mixtral=MixtralConfig(**GQA, num_local_experts=4),  # two of four experts, softmax over the chosen ones
    olmoe=OlmoeConfig(**GQA, num_experts=4, num_experts_per_tok=3),  # softmax over all experts
)
SMALL_STEP = dict(mixtral=0.01, olmoe=0.01)  # where the choice of experts jumps, there is no gradient


@pytest.fixture(scope='module', params=ARCHITECTURES)
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return save_random_model(ARCHITECTURES[request.param], folder, noise=0.05, device='cpu')


def pairs_of_one_length(model, n=3):
    "Return a bound task of `n` pairs with the same number of tokens."
    task = induction_task(n=12)
    lengths = [len(ids) for ids in bind_task(model, task).tokens.ids[:12]]
    common = max(set(lengths), key=lengths.count)
    equal = [e for e, length in zip(task.examples, lengths) if length == common]
    assert len(equal) >= n
    return bind_task(model, Task('one length', equal[:n]))


def swapped(bound):
    "Return the task with positives and negatives exchanged."
    examples = [e._replace(positive=e.negative, negative=e.positive) for e in bound.task.examples]
    return bind_task(bound.model, Task('swapped', examples))


def test_all_of_the_difference_arrives(model):
    for target in 'prediction', 'kl', 'residual', 'logit_diff':
        flow = difference_flow(model, induction_task(n=5), target=target)
        np.testing.assert_allclose(flow.arrived, 1, atol=1e-3)


def test_swapping_the_prompts_changes_the_sign_only(model):
    bound = pairs_of_one_length(model)
    flow, back = difference_flow(bound, edges=True), difference_flow(swapped(bound), edges=True)
    np.testing.assert_allclose(back.by_position, flow.by_position, atol=1e-5)  # fractions: the signs cancel
    np.testing.assert_allclose(back.signed_between, flow.signed_between, atol=1e-5)


class Interpolated:
    "Run pairs of prompts whose embeddings lie between negative and positive."

    def __init__(self, bound, eps):
        self.model, self.n, self.eps = bound.model, bound.n, eps
        self.ids = torch.tensor(bound.tokens.ids)
        self.z_names = [f'blocks.{layer}.attn.hook_z' for layer in range(N_LAYERS)]
        self.last = self.model.hook_dict[f'blocks.{N_LAYERS - 1}.hook_resid_post'].name
        self.kept = {}

    def keep(self, x, hook):
        self.kept[hook.name] = x

    def mix(self, x, hook):
        positive, negative = x.chunk(2)
        return torch.cat([negative + self.eps * (positive - negative), negative])

    def middle(self, x, hook):
        positive, negative = self.kept['embeddings'].chunk(2)
        return negative + self.eps / 2 * (positive - negative)

    def add_zeros(self, x, hook):
        self.kept[hook.name] = torch.zeros_like(x, requires_grad=True)
        return x + self.kept[hook.name]

    def run(self, ids, embed, at_z):
        "Return `z` of every layer (or what `at_z` keeps) and the last position of the final residual stream."
        hooks = [('embed.hook_out', embed), (self.last, self.keep), *((name, at_z) for name in self.z_names)]
        with self.model.hooks(fwd_hooks=hooks):
            self.model.original_model(ids)
        return [self.kept[self.model.hook_dict[name].name] for name in self.z_names], self.kept[self.last][:, -1]

    def gradients(self):
        "Return the attribution of each head by the gradient at the midpoint, target 'residual', [pair, head]."
        with torch.no_grad():
            with self.model.hooks(fwd_hooks=[('embed.hook_out', lambda x, hook: self.kept.update(embeddings=x))]):
                self.model.original_model(self.ids)
            z, resid = self.run(self.ids, self.mix, self.keep)
        change = resid[: self.n] - resid[self.n :]
        zeros, resid = self.run(self.ids[: self.n], self.middle, self.add_zeros)
        metric = (resid * change).sum(-1) / (change * change).sum(-1)
        gradients = torch.autograd.grad(metric.sum(), zeros)
        effects = [(x[: self.n] - x[self.n :]) * g for x, g in zip(z, gradients)]
        return torch.cat([e.reshape(*e.shape[:2], 4, -1).sum((1, 3)) for e in effects], 1)


def test_the_limit_is_the_gradient(model):
    bound = pairs_of_one_length(model)
    family = model.circuit_sae_name.rsplit('/')[-1].rstrip('0123456789')
    between = Interpolated(bound, eps=SMALL_STEP.get(family, 0.1))
    gradients = between.gradients().numpy()
    with model.hooks(fwd_hooks=[('embed.hook_out', between.mix)]):
        flow = difference_flow(bound, target='residual', batch_size=50).by_pair
    assert np.corrcoef(flow.ravel(), gradients.ravel())[0, 1] >= 0.999
    assert np.abs(flow - gradients).sum() <= 0.02 * np.abs(gradients).sum()


def test_edges_add_up(model):
    "The edges into a node sum to its attribution, and the edges into the output to 1."
    flow = difference_flow(model, induction_task(n=3), edges='all')
    into = flow._node_edges.sum(0)
    slots, output = into[:-1].reshape(N_LAYERS, 13), into[-1]
    np.testing.assert_allclose(output, 1, atol=1e-3)
    np.testing.assert_allclose(slots[:, :12].reshape(N_LAYERS, 3, 4).sum(1).ravel(), flow.by_pair.mean(0), atol=1e-3)
    np.testing.assert_allclose(slots[:, 12], flow.mlps.mean(0), atol=1e-3)
    between = difference_flow(model, induction_task(n=3), edges=True)
    np.testing.assert_allclose(flow.between, between.between, atol=1e-4)
    np.testing.assert_allclose(flow.signed_between, between.signed_between, atol=1e-4)
    assert between.between[:4, 4:].any() and not between.between[4:].any() and not between.between[:, :4].any()


def test_padding_changes_nothing(model):
    "Pairs of different lengths in one pass give the same flow and activations as each pair alone."
    bound = bind_task(model, ioi_task(n=5))
    assert len({len(ids) for ids in bound.tokens.ids}) > 2
    acts = cache_head_acts(bound.model, bound.task)
    flow = difference_flow(bound, batch_size=5)
    for i, example in enumerate(bound.task.examples):
        alone = Task('alone', [example] * 2)
        z = cache_head_acts(bound.model, alone).z
        torch.testing.assert_close(acts.z[[i, i + 5]], z[[0, 2]], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(flow.by_pair[i], difference_flow(bound.model, alone).by_pair[0], atol=1e-3)


def test_targets_attribute_their_own_change():
    "The target 'logit_diff' attributes the change of this metric, much as attribution patching does."
    model = tiny_model()
    bound = bind_task(model, ioi_task(n=6))
    flow = difference_flow(bound, target='logit_diff')
    logits = [run(model, [ids]) for ids in bound.tokens.ids]
    change = [
        bound.measure(logit_diff, torch.cat([logits[i], logits[i + 6]]), [i, i]).diff().neg().item() for i in range(6)
    ]
    np.testing.assert_allclose(flow.embedding, np.array(change) / np.mean(change), atol=1e-3)
    assert flow.summary == 'mean' and (flow.values == np.abs(flow.by_pair.mean(0))).all()
    assert np.corrcoef(flow.signed, attribute_heads(bound).signed)[0, 1] > 0.9
    assert difference_flow(bound).summary == 'median'
    same = Task('same', [e._replace(negative=e.positive) for e in bound.task.examples])
    with refuses('no-difference'):
        difference_flow(model, same, target='logit_diff')


def test_fewer_operators_than_attribution_patching(tmp_path):
    "Without edges the flow takes at most 1.2 times as many operators as attribution patching, with edges 1.5 times."
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.n += 1
            return function(*args, **(kwargs or {}))

    def count(function):
        with Count() as counter:
            function()
        return counter.n

    config = LlamaConfig(**dict(GQA, num_hidden_layers=8))
    bound = bind_task(save_random_model(config, tmp_path, device='cpu'), ioi_task(n=4))
    assert bound.identity  # computed once for all scores
    check_flow(bound)  # once for each model
    patching = count(lambda: attribute_heads(bound))
    assert count(lambda: difference_flow(bound)) <= 1.2 * patching
    assert count(lambda: difference_flow(bound, edges=True)) <= 1.5 * patching


OTHER_MIXTURE = Qwen2MoeConfig(**GQA, num_experts=4, moe_intermediate_size=32, shared_expert_intermediate_size=32)


def test_unsupported_layers_are_refused(tmp_path):
    experts = save_random_model(OTHER_MIXTURE, tmp_path / 'experts', device='cpu')
    with refuses('unsupported-model'):
        check_flow(experts)
    with refuses('unsupported-model'):
        difference_flow(experts, induction_task(n=6))
    clipped = save_random_model(OlmoConfig(**GQA, clip_qkv=1.0), tmp_path / 'clipped', device='cpu')
    with refuses('unsupported-model'):
        check_flow(clipped)


def test_find_circuit_without_flow(tmp_path):
    from circuit_sae.find import find_circuit

    model = save_random_model(OTHER_MIXTURE, tmp_path, device='cpu')
    with refuses('unsupported-model'):
        find_circuit(model, induction_task(n=6), score='flow')
    assert find_circuit(model, induction_task(n=6), n_epochs=5, n_train=4).attribution is not None
    assert find_circuit(model, induction_task(n=6), score='unique codes', n_epochs=5, n_train=4).attribution is None


def test_lost_attribution_warns(monkeypatch):
    "A layer that the flow gets wrong is noticed, because the attribution at the embeddings is not 1."
    import circuit_sae.score.flow_sweep as module

    through_mlp = module.through_mlp
    monkeypatch.setattr(module, 'through_mlp', lambda *args: 40 * through_mlp(*args))
    with pytest.warns(UserWarning, match='Do not trust its scores'):
        difference_flow(tiny_model(), induction_task(n=4))


def test_held_norms_lose_attribution():
    assert np.abs(difference_flow(tiny_model(), induction_task(n=4), norms='held').arrived - 1).max() > 0.01


def test_files(tmp_path):
    "A flow comes back from its file whole; a file of older rules is refused."
    bound = bind_task(tiny_model(), induction_task(n=4))
    flow = difference_flow(bound, edges='all')
    flow.save(tmp_path / 'flow.safetensors')
    again = Flow.load(tmp_path / 'flow.safetensors')
    arrays, others = flow.to_state()[0], again.to_state()[0]
    assert sorted(arrays) == sorted(others) and len(arrays) == 7
    assert all((arrays[name] == others[name]).all() for name in arrays)
    assert (again.between == flow.edges.values).all()
    assert again.made_from == flow_record(bound)
    assert again.ranked(1)[0][1] == flow.signed[flow.order()[0]] == again[again.ranked(1)[0][0]]
    old = {key: value for key, value in flow.made_from.items() if key not in ('rules', 'summary')}
    save_tensors(tmp_path / 'old.safetensors', 'Flow', dict(credit=flow.by_position, left=flow.arrived), old)
    with refuses('old-file'):
        Flow.load(tmp_path / 'old.safetensors')


def test_pairs_are_taken_from_the_first_on():
    bound = bind_task(tiny_model(), induction_task(n=6))
    few, all_pairs = difference_flow(bound, n=3), difference_flow(bound)
    np.testing.assert_allclose(few.by_pair, all_pairs.by_pair[:3], atol=1e-5)
    assert few.made_from == flow_record(bound, 3) != all_pairs.made_from
