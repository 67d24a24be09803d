"Check the exported page, opened from disk without a network: every click shows what the method of `Inspector` returns."

import pytest

from circuit_sae.data.tasks import Task
from circuit_sae.find import find_circuit
from circuit_sae.models.load import tiny_model
from circuit_sae.show.inspector import inspect_circuit
from circuit_sae.truth.planted import plant


@pytest.fixture(scope='module')
def insp():
    p = plant('induction', seed=10, n=60)
    return inspect_circuit(find_circuit(p.model, p.task, d_sae=100), p.model, p.truth)


@pytest.fixture
def page(browser, insp, tmp_path):
    "Open the page of `insp`; at the end, check that no script failed and that only the file was requested."
    file = insp.to_html(tmp_path / 'page.html')
    browser.open(file, offline=True).one('#viewer')
    yield browser
    check_quiet(browser, file)


def check_quiet(browser, file):
    "Check that the page wrote no warning and requested no other file."
    requests = [r for r in browser.requests() if r != file.resolve().as_uri() and not r.startswith('data:')]
    assert (browser.messages(), requests) == ([], [])


def cells(page, table):
    "Return the text of every cell of a table."
    rows = f"[...document.querySelectorAll('#{table} tbody tr')]"
    return page(f'{rows}.map(r => [...r.cells].map(c => c.textContent))')


def choose(page, css, value):
    "Choose an option as a user does, by the start of its text or by its place."
    from selenium.webdriver.support.ui import Select

    select = Select(page.one(css))
    if isinstance(value, int):
        select.select_by_index(value)
    else:
        select.select_by_visible_text(next(o.text for o in select.options if o.text.startswith(value)))


def code_name(code):
    return 'no latent' if code < 0 else str(code)


def code_title(code):
    return 'no active latent' if code < 0 else f'code {code}'


def mark(unique):
    return '◆' if unique else ''


def percent(x):
    return f'{int(100 * x + 0.5)} %'


def shown_prompts(page):
    "Return row, label, text, tokens with their shares and most important token of each prompt on the page."
    line = """[
        Number(li.dataset.row),
        li.querySelector('.label').textContent,
        li.querySelector('.text').textContent,
        [...li.querySelectorAll('.token')].map(t => [t.textContent, Number(t.dataset.share)]),
        li.querySelector('.most')?.textContent]"""
    return page(f"[...document.querySelectorAll('#prompts li')].map(li => {line})")


def test_head_shows_its_codes(page, insp):
    for k in (0, 3, len(insp.heads) - 1):
        choose(page, '#head', k)
        h = insp.heads[k]
        rows = insp.codes_of(h).itertuples(index=False, name=None)
        assert cells(page, 'code-table') == [[code_name(c), str(p), str(n), mark(u)] for c, p, n, u in rows]
        title = page.one('#codes-title').text
        assert title.startswith(f'{h}: {insp.scores.name} ')
        assert float(title.split()[-1]) == pytest.approx(insp.scores.values[insp.index(h)], rel=1e-3)


def test_code_shows_prompts_tokens_and_partners(page, insp):
    h = insp.heads[0]
    for row in (0, 1, len(insp.codes_of(h)) - 1):
        code = int(insp.codes_of(h).code[row])
        page.all('#code-table tbody button')[row].click()
        assert page.one('#prompts-title').text.endswith(code_title(code))
        shown = shown_prompts(page)
        prompts = insp.prompts_of(h, code, 20)
        assert [s[:3] for s in shown] == [[p.row, 'positive' if p.positive else 'negative', p.text] for p in prompts]
        for (*_, tokens, most), p in zip(shown, prompts):
            if code < 0:
                assert not tokens
                continue
            carried = [(t, s) for t, s in zip(p.tokens, p.shares) if s]
            assert [t for t, _ in tokens] == [t for t, _ in carried]
            assert [s for _, s in tokens] == pytest.approx([s for _, s in carried], abs=1e-4)
            assert most in [t for t, s in carried if s == p.shares.max()]
        partners = [
            [r.head, code_name(r.code), percent(r.inside), percent(r.outside)]
            for r in insp.switch_with(h, code, 10).itertuples()
        ]
        assert [r[:4] for r in cells(page, 'switch')] == partners


def test_click_on_a_partner_opens_its_code(page, insp):
    h = insp.heads[0]
    partner = insp.switch_with(h, insp.codes_of(h).code[0], 1)
    page.one('#switch tbody button').click()
    assert page.one('#prompts-title').text == f'Prompts of {partner["head"][0]}, {code_title(partner.code[0])}'


def test_slider_moves_heads_precision_recall_and_point(page, insp):
    from selenium.webdriver.common.keys import Keys

    page.one('#tab-cut').click()
    slider = page.one('#threshold')
    points = []
    slider.send_keys(Keys.HOME)
    figure = "[d.dataset.figure, d.querySelector('dd').textContent]"
    figures = f"[...document.querySelectorAll('[data-figure]')].map(d => {figure})"
    for threshold in insp.all_thresholds:
        cut = insp.at(threshold)
        shown = dict(page(figures))
        assert shown['heads'] == str(len(cut.heads))
        assert float(shown['share of all scores']) == pytest.approx(cut.prob, rel=0.01)
        for name in ('precision', 'recall', 'false_positive_rate'):
            assert float(shown[name.replace('_', ' ')]) == pytest.approx(getattr(cut, name), abs=6e-4)
        assert [b.text.split()[0] for b in page.all('#selected button')] == list(map(str, cut.heads[:60]))
        point = page.one('#point')
        points.append((point.get_attribute('cx'), point.get_attribute('cy')))
        slider.send_keys(Keys.ARROW_RIGHT)
    cuts = [insp.at(threshold) for threshold in insp.all_thresholds]
    assert len(set(points)) == len({(c.recall, c.false_positive_rate) for c in cuts})
    page.one('#selected button').click()
    assert page.one('#codes-title').text.startswith(f'{insp.heads[0]}:')


def test_two_heads_show_their_pairs(page, insp):
    page.one('#tab-pairs').click()
    a, b = insp.heads[0], insp.heads[4]
    choose(page, '#first', str(a))
    choose(page, '#second', str(b))
    pairs = insp.pairs_of(a, b)
    rows = pairs.itertuples(index=False, name=None)
    assert cells(page, 'pair-table') == [[*map(str, r[:4]), mark(r[4])] for r in rows]
    assert page.one('#pairs-title').text == f'{len(pairs)} pairs of codes, {pairs.unique.sum()} unique to positives'
    page.all('#pair-table tbody button')[1].click()
    shown = page("[...document.querySelectorAll('#pair-prompts li')].map(li => Number(li.dataset.row))")
    with_a = insp.rows_of(a, pairs.code_a[1])
    assert set(shown) == {r for r in with_a if insp.codes.head(b)[r] == pairs.code_b[1]}
    choose(page, '#second', str(a))
    assert page.one('#pairs-title').text == 'Choose two different heads'


def test_keyboard_and_labels(page):
    from selenium.webdriver.common.keys import Keys

    page.one('#tab-codes').send_keys(Keys.ARROW_RIGHT)
    assert page.one('#tab-flow').get_attribute('aria-selected') == 'true'
    assert page.one('#flow').is_displayed() and not page.all('#codes')[0].is_displayed()
    page.one('#tab-cut').send_keys(Keys.END)
    assert page.one('#pairs').is_displayed()
    assert page("[...document.querySelectorAll('select, input')].every(e => e.labels.length === 1)")
    assert page('document.documentElement.lang') == 'en'


def odd_task():
    "Return a task with markup, quotes and other scripts in its name and its prompts."
    names = [('Ann', 'Bob'), ('Tom', 'Sue'), ('Kim', 'Ron'), ('Pat', 'Lee')]
    rows = [
        dict(
            positive=f'{w} said "no" </script><b id=bad>&amp;\n café 日本 😀, so {w} gave',
            negative=f"{w} said 'no' <!-- <script>&amp;\n thé, so {v} gave",
            answer=' it',
            wrong=' up',
        )
        for w, v in names
    ]
    return Task.from_data(rows, '</title><b id=bad>"\'', answer_token='first', equal_length=False)


def test_any_prompt_is_text(browser, tmp_path):
    model = tiny_model()
    task = odd_task()
    insp = inspect_circuit(find_circuit(model, task, score='unique codes', d_sae=20, n_train=4), model)
    file = insp.to_html(tmp_path / 'odd "page".html')
    browser.open(file, offline=True).one('#viewer')
    h = insp.heads[0]
    shown = browser("[...document.querySelectorAll('#prompts .text')].map(t => t.textContent)")
    prompts = insp.prompts_of(h, insp.codes_of(h).code[0], 20)
    assert shown == [p.text.replace('\n', '⏎\n') for p in prompts]
    assert not browser.all('#bad') and task.name in browser('document.title')
    browser.one('#tab-cut').click()
    assert 'No ground truth was given' in browser.one('#roc').text
    check_quiet(browser, file)


def test_small_page_says_what_it_omits(browser, insp, tmp_path):
    file = insp.to_html(tmp_path / 'small.html', heads=insp.heads[:3], max_mb=0.055)
    browser.open(file, offline=True).one('#viewer')
    about = browser.one('#about').text
    assert file.stat().st_size <= 55_000 and 'the codes of 3 of them' in about
    assert len(browser.all('#head option')) == 3
    kept = browser("document.querySelectorAll('#prompts li').length")
    h = insp.heads[0]
    full = len(insp.rows_of(h, insp.codes_of(h).code[0]))
    if kept < full:
        assert f'{kept} of {full}' in browser.one('#prompts-note').text and 'at most' in about
    browser.one('#tab-cut').click()
    assert 'disabled' not in browser.one('#selected button').get_attribute('outerHTML')
    check_quiet(browser, file)


def test_frame_of_a_notebook(browser, insp, tmp_path):
    head = '<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,">'
    (tmp_path / 'frame.html').write_text(head + insp._repr_html_(), encoding='utf-8')
    browser.open(tmp_path / 'frame.html', offline=True)
    browser.driver.switch_to.frame(browser.one('iframe'))
    browser.one('#viewer')
    browser.one('#tab-pairs').click()
    assert browser.one('#pairs-title').text.endswith('unique to positives')
    browser.driver.switch_to.default_content()
    assert not browser.messages()
