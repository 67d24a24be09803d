"Node scores and pair counts equal a literal reading of their definition, on codes of any shape."
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from circuit_sae.core import InputError
from circuit_sae.score.unique_codes import node_scores, pair_counts, edge_scores, pair_head_counts

def literal_nodes(codes, y):
    out = []
    for h in range(codes.shape[1]):
        positive = {int(c) for c, p in zip(codes[:, h], y) if p and c != -1}
        negative = {int(c) for c, p in zip(codes[:, h], y) if not p and c != -1}
        out.append(len(positive - negative))
    return out

def literal_pairs(codes, y):
    n = codes.shape[1]
    U = [[0]*n for _ in range(n)]
    for g in range(n):
        for h in range(n):
            if g == h: continue
            seen = {True: set(), False: set()}
            for row, p in zip(codes.tolist(), y.tolist()):
                if -1 not in (row[g], row[h]): seen[p].add((row[g], row[h]))
            U[g][h] = len(seen[True] - seen[False])
    return U

@st.composite
def labelled_codes(draw, lowest):
    "Codes of any shape with labels of both classes; often few codes, so that classes collide, sometimes silence in one class."
    n, h = draw(st.integers(2, 20)), draw(st.integers(1, 9))
    codes = draw(arrays(np.int64, (n, h), elements=st.integers(lowest, draw(st.sampled_from([0, 1, 3, 200])))))
    y = draw(arrays(bool, n).filter(lambda y: y.any() and not y.all()))
    if lowest == -1 and draw(st.booleans()): codes[y if draw(st.booleans()) else ~y, draw(st.integers(0, h-1))] = -1
    return codes, y

@pytest.mark.parametrize('lowest', [0, -1], ids=['paper', 'null'])
def test_equal_their_definition(lowest):
    @settings(max_examples=300, deadline=None)
    @given(labelled_codes(lowest))
    def check(case):
        codes, y = case
        U = np.array(literal_pairs(codes, y))
        np.testing.assert_array_equal(node_scores(codes, y), literal_nodes(codes, y))
        np.testing.assert_array_equal(pair_counts(codes, y), U)
        np.testing.assert_array_equal(edge_scores(codes, y), np.triu(U, 1))
    check()

@pytest.mark.parametrize('cells', [1, 60, 400])
def test_pairs_do_not_depend_on_how_many_heads_fit_in_the_table(monkeypatch, cells):
    monkeypatch.setattr('circuit_sae.score.unique_codes._table_cells', cells)
    @settings(max_examples=100, deadline=None)
    @given(labelled_codes(-1))
    def check(case): np.testing.assert_array_equal(pair_counts(*case), literal_pairs(*case))
    check()

@pytest.mark.parametrize('lowest', [0, -1], ids=['paper', 'null'])
def test_many_codes_take_several_runs_of_heads(lowest):
    rng, y = np.random.default_rng(0), np.arange(400) < 150
    codes = rng.integers(lowest, 200, (400, 32)) # 26 heads of 200 codes fit in the table
    codes[:, 3], codes[:, 30], codes[y, 5], codes[~y, 29] = 7, lowest, lowest, lowest # one code, no code, silent in a class
    np.testing.assert_array_equal(pair_counts(codes, y), literal_pairs(codes, y))
    np.testing.assert_array_equal(node_scores(codes, y), literal_nodes(codes, y))

@pytest.mark.parametrize('dtype', [np.int8, np.uint8, np.int32, np.uint64])
def test_kind_of_integer_does_not_matter(dtype):
    rng, y = np.random.default_rng(0), np.arange(60) < 20
    codes = rng.integers(0, 9, (60, 6))
    for score in node_scores, pair_counts: np.testing.assert_array_equal(score(codes.astype(dtype), y), score(codes, y))

def test_silence_everywhere_counts_nothing():
    codes, y = np.full((4, 3), -1), np.array([True, False, False, True])
    assert not node_scores(codes, y).any() and not pair_counts(codes, y).any()

def test_latents_may_be_many():
    "A dense table of the pairs of these two heads would have 10^12 cells."
    codes, y = np.array([[10**6, 0], [10**6, 10**6-1], [5, 10**6-1], [10**6, 0]]), np.array([True, True, False, False])
    np.testing.assert_array_equal(pair_counts(codes, y), [[0, 1], [1, 0]])
    np.testing.assert_array_equal(node_scores(codes, y), [0, 0])

@settings(max_examples=100, deadline=None)
@given(labelled_codes(-1), st.randoms(use_true_random=False))
def test_order_of_examples_and_names_of_codes_do_not_matter(case, random):
    codes, y = case
    rows = list(range(len(y))); random.shuffle(rows)
    names = list(range(201)); random.shuffle(names)
    renamed = np.where(codes == -1, -1, np.array(names)[codes])
    np.testing.assert_array_equal(node_scores(renamed[rows], y[rows]), node_scores(codes, y))
    np.testing.assert_array_equal(pair_counts(renamed[rows], y[rows]), pair_counts(codes, y))

@settings(max_examples=100, deadline=None)
@given(labelled_codes(0))
def test_published_head_counts_by_hand(case):
    codes, y = case
    U, n = np.array(literal_pairs(codes, y)), codes.shape[1]
    listed = [h for i in np.argsort(U.flatten())[::-1] for h in divmod(int(i), n)][:n*n//2]
    np.testing.assert_array_equal(pair_head_counts(codes, y), [listed.count(h) for h in range(n)])

@pytest.mark.parametrize('y', [np.ones(4, bool), np.zeros(4, bool), np.ones(3, bool)])
@pytest.mark.parametrize('score', [node_scores, edge_scores, pair_head_counts])
def test_one_class_and_wrong_length_are_refused(score, y):
    with pytest.raises(InputError): score(np.zeros((4, 3), dtype=int), y)
