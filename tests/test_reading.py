"Check the cards of features, and the page of the inspector that shows them."

import re

import pytest

from circuit_sae.core import refuses
from circuit_sae.features.dictionary import fit_basis
from circuit_sae.features.reading import FeatureCards, head_features, read_features, switch_off
from circuit_sae.features.token_acts import Documents, token_acts
from circuit_sae.find import find_circuit
from circuit_sae.models.load import tiny_model
from circuit_sae.show.inspector import inspect_circuit
from circuit_sae.truth.planted import plant


@pytest.fixture(scope='module')
def planted():
    p = plant('induction', seed=10, n=12)
    return p, find_circuit(p.model, p.task, d_sae=20, n_epochs=30)


@pytest.fixture(scope='module')
def features(planted, tmp_path_factory):
    p, found = planted
    head = found.nodes.ranked(1)[0][0]
    folder = tmp_path_factory.mktemp('features') / 'head'
    text = Documents([p.task.tokens(p.model).ids[0]] * 3)
    return head_features(found, head, p.model, text, width=48, k=4, steps=60, n=4, folder=folder)


def test_all_features_off_is_the_last_step_and_a_single_one_the_effect(planted, features):
    p, _ = planted
    off = features.off
    assert len(off.metric) == len(features.cards) + 2
    i = features.effects.features.tolist().index(features.cards.cards[0].feature)
    assert off.metric[0] - off.metric[1] == pytest.approx(features.effects.drop[:, i].mean(), abs=1e-3)
    everything = switch_off(p.model, p.task, features.dictionary, range(features.dictionary.width), n_shown=1)
    assert everything.metric[-1] == pytest.approx(off.metric[-1], abs=1e-3)
    assert everything.metric[-2] == pytest.approx(off.metric[-1], abs=1e-3)


def test_negative_coefficients_of_a_basis_are_no_examples(planted):
    p, _ = planted
    acts = token_acts(p.model, p.task, 'L1 resid_post')
    cards = read_features(p.model, fit_basis(acts, 'pca', 4), text=acts, task=p.task)
    for card in cards:
        assert all(e.values[e.peak] == max(e.values) > 0 for e in card.examples + card.prompts)
        assert card.density > 0.9
    assert isinstance(cards, FeatureCards) and len(cards) == 4


def test_bad_input_gives_one_error(planted, features):
    p, found = planted
    with refuses('no-such-feature'):
        features['x']
    with refuses('no-such-feature'):
        switch_off(p.model, p.task, features.dictionary, [0, 0])
    with refuses('other-model'):
        head_features(found, 'L0H0', tiny_model())
    with refuses('no-features'):
        inspect_circuit(found, p.model).features_of(features.head)


def test_page_shows_features_and_the_slider(browser, planted, features, tmp_path):
    from selenium.webdriver.common.keys import Keys

    p, found = planted
    insp = inspect_circuit(found, p.model, features=[features])
    browser.open(insp.to_html(tmp_path / 'page.html'), offline=True).one('#viewer')
    browser.one('#tab-features').click()
    rows = browser("[...document.querySelectorAll('#feature-table tbody tr')].map(r => Number(r.dataset.feature))")
    assert rows == [card.feature for card in features.cards]
    browser.all('#feature-table tbody button')[1].click()
    card = features.cards.cards[1]
    assert browser.one('#feature-title').text == f'Feature {card.feature} of {features.head}'
    shown = browser("[...document.querySelectorAll('#feature-prompts .text')].map(t => t.textContent)")
    assert shown == [''.join(e.tokens).replace('\n', '⏎\n') for e in card.prompts]
    slider = browser.one('#off')
    slider.send_keys(Keys.HOME)
    for step, metric in enumerate(features.off.metric):
        assert f'{metric:.2f}' in browser.one('#off-value').text
        first = browser.one('#off-table .next').text
        assert first.split()[0] == (features.off.top[step][0][0][0].strip() or 'space')
        slider.send_keys(Keys.ARROW_RIGHT)
    assert not browser.messages()


def test_page_shows_attribution_and_edges(browser, planted, tmp_path):
    p, found = planted
    insp = inspect_circuit(found, p.model)
    browser.open(insp.to_html(tmp_path / 'page.html'), offline=True).one('#viewer')
    assert not browser.one('#tab-flow').get_attribute('hidden') and not browser.all('#tab-features:not([hidden])')
    browser.one('#tab-flow').click()
    head = insp.heads[0]
    edges = insp.edges_of(head)
    cells = '[...r.cells].map(c => c.textContent)'
    rows = browser(f"[...document.querySelectorAll('#attribution-edges tbody tr')].map(r => {cells}.slice(0, 2))")
    assert rows == [[r.direction, r.head] for r in edges.itertuples()]
    bars = browser("[...document.querySelectorAll('#attribution-positions .bar')].map(b => Number(b.dataset.value))")
    assert bars == pytest.approx(insp.attribution_by_position(head).attribution.tolist(), abs=1e-4)
    codes = browser(f"[...document.querySelectorAll('#attribution-codes tbody tr')].map(r => {cells})")
    assert [int(c[1]) for c in codes] == insp.attribution_by_code(head).pairs.tolist()
    note = browser("document.querySelector('#codes-note').textContent")
    shown = float(re.search(r'effect ([+-][0-9.]+) %', note)[1])
    assert shown == pytest.approx(100 * insp.numbers_of(head)['effect'], abs=0.06)
    assert not browser.messages()
