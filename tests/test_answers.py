"""Answers of several tokens: every number equals the one that plain transformers give, computed token by token."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from circuit_sae.causal.nodes import patch_nodes
from circuit_sae.causal.patching import patch_heads
from circuit_sae.causal.paths import patch_paths
from circuit_sae.causal.verify import measure_sets
from circuit_sae.core import InputError, refuses
from circuit_sae.data.batches import bind_task, pair_batches
from circuit_sae.data.prompts import ioi_task, tiny_tokenizer
from circuit_sae.data.tasks import Task
from circuit_sae.find import find_circuit
from circuit_sae.models.behaviour import check_behaviour, judge
from circuit_sae.models.forward import run_pairs
from circuit_sae.models.load import quietly, save_random_model, tiny_model
from circuit_sae.models.rerun import collect_z, run_edited
from circuit_sae.score.attribution import attribute_heads
from circuit_sae.score.flow import difference_flow
from circuit_sae.trust.certificate import certify
from circuit_sae.truth.planted import plant

SIZE = dict(vocab_size=len(tiny_tokenizer()), max_position_embeddings=128)
LLAMA = dict(SIZE, hidden_size=16, num_hidden_layers=2, intermediate_size=32, num_attention_heads=4)
KINDS = dict(
    llama=LlamaConfig(**LLAMA, num_key_value_heads=2),
    gpt2=GPT2Config(vocab_size=SIZE['vocab_size'], n_positions=128, n_embd=16, n_layer=2, n_head=4),
)


def make_pairs(n=4):
    "Return pairs of equal and unequal length whose answers have one token, several, and several alternatives."
    endings = [
        lambda a, w: ((a,), (w,)),
        lambda a, w: ((f'{a} Smith',), (f'{w} Jo',)),
        lambda a, w: ((a, f'{a.strip()}xyz', ' Qrst'), (f'{w}berg over there',)),
        lambda a, w: ((' the old man',), (w, ' nobody at all')),
    ]
    pairs = []
    for i, e in enumerate(ioi_task(n=n).bind(tiny_tokenizer()).examples):
        answer, wrong = endings[i % 4](e.answer[0], e.wrong[0])
        negative = e.negative if i % 2 else f'Well, {e.negative}'
        pairs.append(e._replace(negative=negative, answer=answer, wrong=wrong))
    return pairs


@pytest.fixture(scope='module', params=KINDS)
def bound(request, tmp_path_factory):
    "Return the task bound to a model; `plain` is the same model of transformers."
    folder = tmp_path_factory.mktemp(request.param) / request.param
    bound = bind_task(save_random_model(KINDS[request.param], folder), Task('answers', make_pairs()))
    with quietly():
        bound.plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    return bound


def by_token(plain, prompt, answer):
    "Return the log-probability of an answer from one pass of the plain model for each of its tokens."
    ids, total = list(prompt), 0.0
    for token in answer if isinstance(answer, tuple) else (answer,):
        with torch.no_grad():
            total += plain(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)[token].item()
        ids.append(token)
    return total


def log_probs(bound, row):
    "Return the log-probabilities of the answers and of the wrong answers of a row."
    t = bound.tokens
    parts = ([by_token(bound.plain, t.ids[row], a) for a in x[row]] for x in (t.answers, t.wrongs))
    return [np.logaddexp.reduce(p) for p in parts]


def test_joint_probability_is_that_of_plain_transformers(bound):
    assert {len(bound.tokens.sequences(i)) for i in range(bound.n)} == {0, 2, 3}
    assert bound.uneven and len(bound.long_answers) == 3
    wanted = np.array([log_probs(bound, row) for row in range(2 * bound.n)])
    for batch_size in 1, 3, 50:
        found = check_behaviour(bound, batch_size=batch_size)
        assert np.abs(found.logit_diff - (wanted[:, 0] - wanted[:, 1])).max() < 1e-5
        assert np.abs(np.log(found.prob) - wanted[:, 0]).max() < 1e-4


def test_short_answers_give_what_they_gave_bit_for_bit(bound):
    "The behaviour of a task without long answers is that of the code before there were any."
    short = bind_task(bound.model, ioi_task(n=6))
    judged = np.zeros((12, 3), np.float32)
    for batch, same in zip(pair_batches(short), pair_batches(short, answers=True), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(batch, same))
        logits = run_pairs(short.model, batch.positives, batch.negatives, lengths=batch.lengths)
        for first, part in zip((0, 6), logits):
            for i, row in zip(batch.pairs + first, part):
                a, w = (list(x[i]) for x in (short.tokens.answers, short.tokens.wrongs))
                right = row[a].logsumexp(-1)
                difference = right - row[w].logsumexp(-1)
                rank = (row > row[a].max()).sum()
                judged[i] = difference.item(), rank.item(), (right - row.logsumexp(-1)).exp().item()
    assert np.array_equal(check_behaviour(short).judged, judged)


def patched(bound, pair, head, scale=1.0):
    "Return log p(answers) - log p(wrong answers) with a head moved to its output on the negative, by hand."
    t, n = bound.tokens, bound.n
    layer, number = divmod(head, bound.model.cfg.n_heads)
    parts = []
    for answers in (t.answers[pair], t.wrongs[pair]):
        values = []
        for answer in answers:
            answer = answer if isinstance(answer, tuple) else (answer,)
            p, q = (list(t.ids[row]) + list(answer[:-1]) for row in (pair, pair + n))
            own = np.r_[bound.align(pair).partners, len(t.ids[pair + n]) + np.arange(len(answer) - 1)]
            new = collect_z(bound.model, [q])[1][layer][:, own, number]
            values.append(_log_prob(bound.model, p, answer, layer, number, new, scale))
        parts.append(np.logaddexp.reduce(values))
    return parts[0] - parts[1]


def _log_prob(model, ids, answer, layer, number, new, scale):
    "Return the log-probability of the answer whose tokens but the last end `ids`."
    total = 0.0
    for k, token in enumerate(answer):
        stop = len(ids) - len(answer) + 1 + k

        def edit(at, z):
            if at == layer:
                z = z.clone()
                z[:, :, number] += scale * (new[:, :stop] - z[:, :, number])
            return z

        total += run_edited(model, [ids[:stop]], edit)[0].double().log_softmax(-1)[token].item()
    return total


def test_patching_and_attribution(bound):
    effects = patch_heads(bound)
    heads, pairs = (0, 3, 6), (1, 2, 3)
    by_hand = np.array([[patched(bound, i, h) for h in heads] for i in pairs])
    assert np.abs(by_hand - effects.patched[np.ix_(pairs, heads)]).max() < 2e-4
    assert np.allclose(effects.clean, check_behaviour(bound).logit_diff[: bound.n], atol=1e-4)
    again = patch_heads(bound, batch_size=1)
    assert np.abs(effects.patched - again.patched).max() < 1e-4
    found, alone = attribute_heads(bound), attribute_heads(bound, batch_size=1)
    assert np.abs(found.by_pair - alone.by_pair).max() < 1e-4
    step = 1e-2
    for i in pairs:
        slopes = [(patched(bound, i, h, -step) - patched(bound, i, h, step)) / (2 * step) for h in heads]
        assert np.abs(np.array(slopes) - found.by_pair[i, list(heads)]).max() < 0.02 * np.abs(slopes).max() + 1e-4


def test_circuits_with_long_answers(bound):
    n = bound.model.cfg.n_layers * bound.model.cfg.n_heads
    whole, negative = measure_sets(bound, None, np.ones((1, n), dtype=bool))
    found = check_behaviour(bound).logit_diff
    assert np.abs(whole[0, 0] - found[: bound.n]).max() < 1e-4 and np.abs(negative - found[bound.n :]).max() < 1e-4
    one = measure_sets(bound, None, ~np.eye(n, dtype=bool)[:2])[0][0]
    assert np.abs(one.T - patch_heads(bound).patched[:, :2]).max() < 1e-4


def test_stages_that_measure_one_token_refuse(bound):
    equal = [e._replace(negative=e.positive.replace('the', 'a', 1)) for e in make_pairs(4)]
    long = bind_task(bound.model, Task('long', equal))
    for stage in patch_paths, patch_nodes:
        with refuses('long-answers'):
            stage(long, heads=['L0H0', 'L1H0']) if stage is patch_paths else stage(long)
    batch = pair_batches(long)[0]
    with refuses('long-answers'):
        long.measure(judge, run_pairs(bound.model, batch.positives, batch.negatives)[0], batch.pairs)


def test_attribution_ranks_heads_and_the_flow_refuses_answers_of_several_tokens():
    model = tiny_model()
    settings = dict(n_train=4, n_epochs=2, d_sae=8)
    found = find_circuit(model, Task('answers', make_pairs(12)), **settings)
    assert found.attribution.made_from['metric'] == 'logit_diff' and found.nodes.values.any()
    with pytest.raises(InputError):
        find_circuit(model, Task('answers', make_pairs(12)), score='flow', **settings)
    with pytest.raises(InputError):
        difference_flow(model, Task('answers', make_pairs(4)), target='logit_diff')


def test_a_circuit_without_answers_is_certified(tmp_path):
    "Prompts alone: find, certificate and its page measure how far the prediction moves."
    p = plant('chain', n=40)
    task = Task('alone', [e._replace(answer=(), wrong=()) for e in p.task.examples])
    found = find_circuit(p.model, task, n_epochs=5, d_sae=20)
    certificate = certify(found, p.model, n_draws=10)
    assert certificate and certificate.settings['metric'] == 'kl_div'
    assert set(found.circuit) == set(p.truth)
    page = [path.read_text(encoding='utf-8') for path in certificate.save(tmp_path)]
    assert all('pairs without answers' in text for text in page[1:])
