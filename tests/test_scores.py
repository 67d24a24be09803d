"Node scores and pair counts equal a literal reading of their definition; attributions do not depend on batches."

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from transformers import GPTJConfig, LlamaConfig

from circuit_sae.core import InputError
from circuit_sae.data.batches import BoundTask, bind_task, pair_batches
from circuit_sae.data.prompts import induction_task, tiny_tokenizer
from circuit_sae.models.load import save_random_model, tiny_model
from circuit_sae.models.rerun import collect_z
from circuit_sae.score.attribution import (
    HeadAttribution,
    PairMetric,
    attribute_heads,
    embeddings,
    summarize_pairs,
    z_gradients,
)
from circuit_sae.score.edges import attribute_edges
from circuit_sae.score.flow import check_flow, difference_flow
from circuit_sae.score.unique_codes import edge_scores, node_scores, pair_counts, pair_head_counts


def literal_nodes(codes, y):
    "Count unique codes with two sets for each head."
    counts = []
    for h in range(codes.shape[1]):
        positive = {int(c) for c, p in zip(codes[:, h], y) if p and c != -1}
        negative = {int(c) for c, p in zip(codes[:, h], y) if not p and c != -1}
        counts.append(len(positive - negative))
    return counts


def literal_pairs(codes, y):
    "Count unique pairs of codes with two sets for each pair of heads."
    n = codes.shape[1]
    counts = [[0] * n for _ in range(n)]
    for g in range(n):
        for h in range(n):
            if g == h:
                continue
            seen = {True: set(), False: set()}
            for row, p in zip(codes.tolist(), y.tolist()):
                if -1 not in (row[g], row[h]):
                    seen[p].add((row[g], row[h]))
            counts[g][h] = len(seen[True] - seen[False])
    return counts


@st.composite
def labelled_codes(draw, lowest):
    "Draw codes of any shape with labels of both classes, often few codes, sometimes one head with null codes only."
    n = draw(st.integers(2, 20))
    h = draw(st.integers(1, 9))
    highest = draw(st.sampled_from([0, 1, 3, 200]))
    codes = draw(arrays(np.int64, (n, h), elements=st.integers(lowest, highest)))
    y = draw(arrays(bool, n).filter(lambda y: y.any() and not y.all()))
    if lowest == -1 and draw(st.booleans()):
        rows = y if draw(st.booleans()) else ~y
        codes[rows, draw(st.integers(0, h - 1))] = -1
    return codes, y


@pytest.mark.parametrize('lowest', [0, -1], ids=['paper', 'null'])
def test_equal_their_definition(lowest):
    @settings(max_examples=200, deadline=None)
    @given(labelled_codes(lowest))
    def check(case):
        codes, y = case
        pairs = np.array(literal_pairs(codes, y))
        np.testing.assert_array_equal(node_scores(codes, y), literal_nodes(codes, y))
        np.testing.assert_array_equal(pair_counts(codes, y), pairs)
        np.testing.assert_array_equal(edge_scores(codes, y), np.triu(pairs, 1))

    check()


@pytest.mark.parametrize('cells', [1, 60, 400])
def test_pairs_do_not_depend_on_how_many_heads_fit_in_the_table(monkeypatch, cells):
    monkeypatch.setattr('circuit_sae.score.unique_codes._TABLE_CELLS', cells)

    @settings(max_examples=100, deadline=None)
    @given(labelled_codes(-1))
    def check(case):
        np.testing.assert_array_equal(pair_counts(*case), literal_pairs(*case))

    check()


@pytest.mark.parametrize('lowest', [0, -1], ids=['paper', 'null'])
def test_many_codes_take_several_runs_of_heads(lowest):
    rng = np.random.default_rng(0)
    y = np.arange(400) < 150
    codes = rng.integers(lowest, 200, (400, 32))  # 26 heads of 200 codes fit in the table
    codes[:, 3] = 7  # one code
    codes[:, 30] = lowest  # no code
    codes[y, 5] = lowest  # null on positives
    codes[~y, 29] = lowest  # null on negatives
    np.testing.assert_array_equal(pair_counts(codes, y), literal_pairs(codes, y))
    np.testing.assert_array_equal(node_scores(codes, y), literal_nodes(codes, y))


@pytest.mark.parametrize('dtype', [np.int8, np.uint8, np.int32, np.uint64])
def test_kind_of_integer_does_not_matter(dtype):
    y = np.arange(60) < 20
    codes = np.random.default_rng(0).integers(0, 9, (60, 6))
    for score in node_scores, pair_counts:
        np.testing.assert_array_equal(score(codes.astype(dtype), y), score(codes, y))


def test_null_codes_only_count_nothing():
    codes = np.full((4, 3), -1)
    y = np.array([True, False, False, True])
    assert not node_scores(codes, y).any()
    assert not pair_counts(codes, y).any()


def test_latents_may_be_many():
    "A dense table of the pairs of these two heads would have 10^12 cells."
    codes = np.array([[10**6, 0], [10**6, 10**6 - 1], [5, 10**6 - 1], [10**6, 0]])
    y = np.array([True, True, False, False])
    np.testing.assert_array_equal(pair_counts(codes, y), [[0, 1], [1, 0]])
    np.testing.assert_array_equal(node_scores(codes, y), [0, 0])


@settings(max_examples=100, deadline=None)
@given(labelled_codes(-1), st.randoms(use_true_random=False))
def test_order_of_examples_and_names_of_codes_do_not_matter(case, random):
    codes, y = case
    rows = list(range(len(y)))
    random.shuffle(rows)
    names = list(range(201))
    random.shuffle(names)
    renamed = np.where(codes == -1, -1, np.array(names)[codes])
    np.testing.assert_array_equal(node_scores(renamed[rows], y[rows]), node_scores(codes, y))
    np.testing.assert_array_equal(pair_counts(renamed[rows], y[rows]), pair_counts(codes, y))


@settings(max_examples=100, deadline=None)
@given(labelled_codes(0))
def test_published_head_counts_by_hand(case):
    codes, y = case
    pairs = np.array(literal_pairs(codes, y))
    n = codes.shape[1]
    order = np.argsort(pairs.flatten())[::-1]
    listed = [h for i in order for h in divmod(int(i), n)][: n * n // 2]
    np.testing.assert_array_equal(pair_head_counts(codes, y), [listed.count(h) for h in range(n)])


@pytest.mark.parametrize(
    'y, code', [(np.ones(4, bool), 'one-class'), (np.zeros(4, bool), 'one-class'), (np.ones(3, bool), 'labels')]
)
@pytest.mark.parametrize('score', [node_scores, edge_scores, pair_head_counts])
def test_one_class_and_wrong_length_are_refused(score, y, code):
    with pytest.raises(InputError) as error:
        score(np.zeros((4, 3), dtype=int), y)
    assert error.value.code == code


def effects_one_pair_at_a_time(bound, metric):
    "Return attribution patching of every pair by itself, [pair, head]."
    rows = []
    for batch in pair_batches(bound, 1):
        measure = PairMetric(bound, metric, batch.pairs)
        measure.negative, z_neg = collect_z(bound.model, batch.negatives)
        _, z, gradient = z_gradients(bound.model, batch.positives, measure.at_positives)
        rows.append((int(batch.pairs[0]), ((z - z_neg) * gradient).sum((1, 2, 4)).flatten().numpy()))
    return np.array([effects for _, effects in sorted(rows, key=lambda row: row[0])])


@pytest.mark.parametrize('metric', ['logit_diff', 'prediction', 'kl'])
def test_attribution_of_a_pair_does_not_depend_on_its_batch(metric):
    "Prompts of several lengths are padded to one batch; padding must change nothing."
    bound = bind_task(tiny_model(n_layers=2), induction_task(n=6, seed=3))
    together = attribute_heads(bound, metric=metric)
    np.testing.assert_allclose(together.by_pair, effects_one_pair_at_a_time(bound, metric), atol=1e-5)
    assert together.by_pair.shape == (6, 8)
    values, signed = summarize_pairs(together.by_pair, together.changes, together.made_from['summary'])
    np.testing.assert_allclose(together.values, values)
    np.testing.assert_allclose(together.signed, signed)


def test_attribution_without_answers_treats_both_prompts_alike():
    "Swapping the prompts of a task leaves the gradient at both prompts as it is, whatever the answers are."
    bound = bind_task(tiny_model(n_layers=2), induction_task(n=4, seed=5))
    n = bound.n
    swapped = BoundTask(bound.model, bound.task, bound.tokens._replace(ids=bound.tokens.ids[n:] + bound.tokens.ids[:n]))
    for metric in 'prediction', 'kl':
        one, other = (attribute_heads(b, metric=metric, at='both') for b in (bound, swapped))
        np.testing.assert_allclose(one.by_pair, other.by_pair, atol=1e-6)


def test_attribution_is_read_back_with_its_pairs():
    made = attribute_heads(bind_task(tiny_model(n_layers=2), induction_task(n=3)), metric='kl')
    again = HeadAttribution.from_state(*made.to_state())
    np.testing.assert_array_equal(again.by_pair, made.by_pair)
    np.testing.assert_array_equal(again.values, made.values)
    assert (again.made_from, again.name) == (made.made_from, made.name)


SIZES = dict(
    vocab_size=len(tiny_tokenizer()), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
)
OLD_SIZES = dict(vocab_size=len(tiny_tokenizer()), n_embd=48, n_layer=2, n_head=4, n_positions=256)


@pytest.mark.parametrize('kind', ['llama', 'gptj'])
def test_edges_are_the_limit_of_the_flow(kind, tmp_path):
    "Between nearly equal prompts both attribute the same to each input of a receiver: q, k and v."
    config = dict(
        llama=LlamaConfig(**SIZES, num_key_value_heads=2),
        gptj=GPTJConfig(**OLD_SIZES, rotary_dim=8),
    )[kind]
    model, eps = save_random_model(config, tmp_path, noise=0.05, device='cpu'), 0.01
    bound = bind_task(model, induction_task(n=2)).take(1)
    first = embeddings(model, np.array(bound.tokens.ids[1:]))
    check_flow(bound)  # the checks of a model run it once, without the hooks below
    attribute_edges(bound)

    def near(x, hook):
        return torch.cat([torch.lerp(first, x[:1], eps), x[1:]])

    with model.hooks(fwd_hooks=[('embed.hook_out', near)]):
        flow = difference_flow(bound, edges='all', target='logit_diff').node_edges
    by_part = {(s, r): [flow.between((0, s), (1, r), p) for p in 'qkv'] for s in range(4) for r in range(4)}
    wanted = [max(parts, key=abs) for parts in by_part.values()]
    once = iter([lambda x: x, lambda x: torch.lerp(first, x, eps)])  # the negatives run first

    def of_pass(x, hook):
        return next(once)(x)

    with model.hooks(fwd_hooks=[('embed.hook_out', of_pass)]):
        found = attribute_edges(bound)
    got = [found[(0, s), (1, r)] for s, r in by_part]
    assert np.corrcoef(got, wanted)[0, 1] > 0.999
