"Every figure of `circuit_sae.truth.evaluate` against scikit-learn or brute force, on scores full of ties."

import itertools
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from circuit_sae.core import refuses
from circuit_sae.results import EdgeScores, HeadScores
from circuit_sae.truth.evaluate import (
    average_precision,
    best_f1,
    evaluate,
    precision_at_k,
    precision_recall_curve,
    pseudo_f1,
    roc_auc,
    roc_curve,
)
from circuit_sae.truth.references import reference, reference_edges, references

many = settings(deadline=None, derandomize=True, database=None, max_examples=100)


@st.composite
def labelled(draw, max_size=60, levels=5):
    "Scores and labels with at least one of each; few levels, so most scores are tied."
    n = draw(st.integers(2, max_size))
    score = draw(st.sampled_from([st.integers(0, 0), st.integers(0, 1), st.integers(0, levels), st.floats(-1e6, 1e6)]))
    s = draw(st.lists(score, min_size=n, max_size=n))
    t = draw(st.lists(st.booleans(), min_size=n, max_size=n).filter(lambda t: 0 < sum(t) < n))
    return np.array(s, float), np.array(t)


@many
@given(labelled())
def test_areas_agree_with_scikit_learn(x):
    s, t = x
    assert roc_auc(s, t) == pytest.approx(metrics.roc_auc_score(t, s), abs=1e-9)
    assert average_precision(s, t) == pytest.approx(metrics.average_precision_score(t, s), abs=1e-9)


@many
@given(labelled())
def test_curves_agree_with_scikit_learn(x):
    s, t = x
    for ours, theirs in zip(roc_curve(s, t), metrics.roc_curve(t, s, drop_intermediate=False)):
        np.testing.assert_allclose(ours, theirs)
    p, r, thr = metrics.precision_recall_curve(t, s)  # lowest threshold first, with a point (1, 0) added at the end
    for ours, theirs in zip(precision_recall_curve(s, t), (p[:-1], r[:-1], thr)):
        np.testing.assert_allclose(ours, theirs[::-1])


@many
@given(labelled())
def test_auc_is_mann_whitney_and_the_area_under_the_curve(x):
    s, t = x
    a, b = s[t][:, None], s[~t]
    assert roc_auc(s, t) == pytest.approx(((a > b) + (a == b) / 2).mean())
    fpr, tpr, _ = roc_curve(s, t)
    assert roc_auc(s, t) == pytest.approx(sum((fpr[1:] - fpr[:-1]) * (tpr[1:] + tpr[:-1]) / 2))
    assert roc_auc(-s, t) == pytest.approx(1 - roc_auc(s, t))


@many
@given(labelled())
def test_best_f1_is_the_best_over_all_thresholds(x):
    s, t = x
    best = best_f1(s, t)
    assert best.value == pytest.approx(max(2 * (t & (s >= c)).sum() / (t.sum() + (s >= c).sum()) for c in np.unique(s)))
    assert best.value == pytest.approx(metrics.f1_score(t, s >= best.threshold))
    assert best.n == (s >= best.threshold).sum()


@many
@given(labelled())
def test_pseudo_f1_is_the_harmonic_mean_of_sensitivity_and_specificity(x):
    s, t = x

    def at(c):
        sens, spec = (s >= c)[t].mean(), (s < c)[~t].mean()
        return 2 * sens * spec / (sens + spec) if sens + spec else 0

    assert pseudo_f1(s, t).value == pytest.approx(max(map(at, np.unique(s))))


@many
@given(labelled(max_size=6, levels=2), st.data())
def test_precision_at_k_is_the_mean_over_all_orders_of_ties(x, data):
    s, t = x
    k = data.draw(st.integers(1, len(s)))
    orders = [o for o in itertools.permutations(range(len(s))) if all(s[a] >= s[b] for a, b in itertools.pairwise(o))]
    assert precision_at_k(s, t, k) == pytest.approx(np.mean([t[list(o[:k])].mean() for o in orders]))


@many
@given(labelled(levels=9), st.randoms(use_true_random=False))
def test_nothing_depends_on_the_order_or_scale_of_scores(x, rnd):
    s, t = x
    order = list(range(len(s)))
    rnd.shuffle(order)
    rank = np.unique(s, return_inverse=True)[1]
    for other in (evaluate(s[order], t[order]), evaluate(rank.astype(float), t)):
        for k, v in evaluate(s, t).figures.items():
            assert other.figures[k] == pytest.approx(v), k


@many
@given(labelled(max_size=20))
def test_single_and_stacked_figures_agree(x):
    e = evaluate(*x)
    assert e.figures == pytest.approx(
        dict(
            roc_auc=roc_auc(*x),
            average_precision=average_precision(*x),
            precision_at_k=precision_at_k(*x),
            best_f1=best_f1(*x).value,
            pseudo_f1=pseudo_f1(*x).value,
        )
    )
    for k, v in e.shuffled(20).items():
        assert v.shape == (20,) and (v >= 0).all() and (v <= 1).all(), k
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        repr(e)


@pytest.mark.parametrize('r', references(), ids=lambda r: r.name)
def test_a_constant_score_is_worth_nothing(r):
    e = evaluate(np.zeros((r.n_layers, r.n_heads)), r)
    assert e.roc_auc == 0.5
    assert e.average_precision == e.precision_at_k == pytest.approx(e.base_rate)
    assert evaluate(r.mask().astype(float), r).figures == dict.fromkeys(e.figures, 1)


def test_edges_are_judged_within_possible_pairs():
    edges = reference_edges('docstring')
    s = np.where(edges.mask(), 1.0, 0.0)
    s[~edges.possible()] = np.nan  # scores of impossible pairs are never read
    e = evaluate(s, edges)
    assert (e.n, e.n_positives, e.unit, e.roc_auc, e.average_precision) == (384, 12, 'edges', 1, 1)


def test_results_are_judged_like_their_arrays():
    ioi = reference('ioi')
    counts = np.arange(144) % 7
    assert evaluate(HeadScores(counts, 12, signed=-counts), ioi).figures == evaluate(counts, ioi).figures
    edges = reference_edges('ioi')
    s = np.random.default_rng(0).normal(size=(144, 144))
    assert evaluate(EdgeScores(s, 12), edges).figures == evaluate(s, edges).figures


@pytest.mark.parametrize(
    'scores, truth, kw, code',
    [
        (np.zeros(32), ['11.10'], dict(n_heads=8), 'other-model'),
        (np.zeros((4, 8)), reference('ioi'), {}, 'other-model'),
        (np.zeros((12, 12)), reference('docstring'), {}, 'other-model'),
        (np.zeros(100), reference('ioi'), {}, 'other-model'),
        (np.zeros(4), ['0.1'], {}, 'no-shape'),
        (np.zeros(4), [], {}, 'empty-truth'),
        (np.zeros(4), [False] * 4, {}, 'empty-truth'),
        (np.zeros(4), [True] * 4, {}, 'whole-model'),
        (np.zeros(4), [True] * 3, {}, 'label-shape'),
        ([0, np.nan], [True, False], {}, 'not-finite'),
        ([0, np.inf], [True, False], {}, 'not-finite'),
        ([], [], {}, 'score-shape'),
        (['a', 'b'], [True, False], {}, 'not-scores'),
        (np.zeros(5), ['0.1'], dict(n_heads=2), 'score-shape'),
        (np.zeros((2, 2)), 'ioi', {}, 'not-a-truth'),
        (np.zeros((2, 2)), 3, {}, 'not-a-truth'),
        (np.zeros((2, 2)), ['name mover'], {}, 'not-a-head'),
        (np.zeros((3, 3)), reference_edges('ioi'), {}, 'score-shape'),
        (HeadScores(np.zeros(144), 8), reference('ioi'), {}, 'other-model'),
        (EdgeScores(np.zeros((144, 144)), 8), reference_edges('ioi'), {}, 'score-shape'),
    ],
)
def test_input_that_does_not_fit_is_refused(scores, truth, kw, code):
    with refuses(code):
        evaluate(scores, truth, **kw)
