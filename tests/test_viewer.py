"Check the exported page, opened from disk without a network: every click shows what the method of `Inspector` returns."
import pytest
from circuit_sae.find import find_circuit
from circuit_sae.show.inspector import inspect_circuit
from circuit_sae.models.load import tiny_model
from circuit_sae.truth.planted import plant
from circuit_sae.data.tasks import Task

@pytest.fixture(scope='module')
def insp():
    p = plant('induction', seed=10, n=60)
    return inspect_circuit(find_circuit(p.model, p.task, d_sae=100), p.model, p.truth)

@pytest.fixture
def page(browser, insp, tmp_path):
    "The page of `insp`; at the end nothing may have gone wrong, and nothing been asked for but the file."
    file = insp.to_html(tmp_path/'page.html')
    browser.open(file, offline=True).one('#viewer')
    yield browser
    quiet(browser, file)

def quiet(browser, file): assert (browser.messages(), [r for r in browser.requests() if r != file.resolve().as_uri() and not r.startswith('data:')]) == ([], [])

def cells(page, table): return page(f"[...document.querySelectorAll('#{table} tbody tr')].map(r => [...r.cells].map(c => c.textContent))")
def choose(page, css, value):
    "Choose an option as a user does, by its text or its place."
    from selenium.webdriver.support.ui import Select
    s = Select(page.one(css))
    s.select_by_index(value) if isinstance(value, int) else s.select_by_visible_text(next(o.text for o in s.options if o.text.startswith(value)))
def code_name(c): return 'no latent' if c < 0 else str(c)
def mark(unique): return '◆' if unique else ''
def percent(x): return f'{int(100*x + .5)} %'

def test_head_shows_its_codes(page, insp):
    for k in (0, 3, len(insp.heads) - 1):
        choose(page, '#head', k)
        h = insp.heads[k]
        assert cells(page, 'code-table') == [[code_name(c), str(p), str(n), mark(u)] for c, p, n, u in insp.codes_of(h).itertuples(index=False, name=None)]
        title = page.one('#codes-title').text
        assert title.startswith(f'{h}: {insp.scores.name} ')
        assert float(title.split()[-1]) == pytest.approx(insp.scores.values[insp.index(h)], rel=1e-3)

def test_code_shows_prompts_tokens_and_partners(page, insp):
    h = insp.heads[0]
    for row in (0, 1, len(insp.codes_of(h)) - 1):
        code = int(insp.codes_of(h).code[row])
        page.all('#code-table tbody button')[row].click()
        assert page.one('#prompts-title').text.endswith('no active latent' if code < 0 else f'code {code}')
        shown = page("[...document.querySelectorAll('#prompts li')].map(li => [Number(li.dataset.row), li.querySelector('.label').textContent, li.querySelector('.text').textContent, "
                     "[...li.querySelectorAll('.token')].map(t => [t.textContent, Number(t.dataset.share)]), li.querySelector('.most')?.textContent])")
        prompts = insp.prompts_of(h, code, 20)
        assert [s[:3] for s in shown] == [[p.row, 'positive' if p.positive else 'negative', p.text] for p in prompts]
        for (*_, tokens, most), p in zip(shown, prompts):
            if code < 0: assert not tokens; continue
            carried = [(t, s) for t, s in zip(p.tokens, p.shares) if s]
            assert [t for t, _ in tokens] == [t for t, _ in carried] and [s for _, s in tokens] == pytest.approx([s for _, s in carried], abs=1e-4)
            assert most in [t for t, s in carried if s == p.shares.max()]
        partners = insp.switch_with(h, code, 10)
        assert [r[:4] for r in cells(page, 'switch')] == [[r.head, code_name(r.code), percent(r.inside), percent(r.outside)] for r in partners.itertuples()]

def test_partner_leads_on(page, insp):
    partner = insp.switch_with(insp.heads[0], insp.codes_of(insp.heads[0]).code[0], 1)
    page.one('#switch tbody button').click()
    assert page.one('#prompts-title').text == f'Prompts of {partner["head"][0]}, {"no active latent" if partner.code[0] < 0 else f"code {partner.code[0]}"}'

def test_slider_moves_heads_precision_recall_and_point(page, insp):
    from selenium.webdriver.common.keys import Keys
    page.one('#tab-cut').click()
    slider, points = page.one('#threshold'), []
    slider.send_keys(Keys.HOME)
    for t in insp.all_thresholds:
        cut = insp.at(t)
        shown = page("Object.fromEntries([...document.querySelectorAll('[data-figure]')].map(d => [d.dataset.figure, d.querySelector('dd').textContent]))")
        assert shown['heads'] == str(len(cut.heads)) and float(shown['share of all scores']) == pytest.approx(cut.prob, rel=.01)
        for name in ('precision', 'recall', 'false_positive_rate'): assert float(shown[name.replace('_', ' ')]) == pytest.approx(getattr(cut, name), abs=6e-4)
        assert [b.text.split()[0] for b in page.all('#selected button')] == list(map(str, cut.heads[:60]))
        points.append((page.one('#point').get_attribute('cx'), page.one('#point').get_attribute('cy')))
        slider.send_keys(Keys.ARROW_RIGHT)
    assert len(set(points)) == len({(c.recall, c.false_positive_rate) for c in map(insp.at, insp.all_thresholds)})
    page.one('#selected button').click()
    assert page.one('#codes-title').text.startswith(f'{insp.heads[0]}:')

def test_two_heads_show_their_pairs(page, insp):
    page.one('#tab-pairs').click()
    a, b = insp.heads[0], insp.heads[4]
    choose(page, '#first', str(a)); choose(page, '#second', str(b))
    pairs = insp.pairs_of(a, b)
    assert cells(page, 'pair-table') == [[*map(str, r[:4]), mark(r[4])] for r in pairs.itertuples(index=False, name=None)]
    assert page.one('#pairs-title').text == f'{len(pairs)} pairs of codes, {pairs.unique.sum()} unique to positives'
    page.all('#pair-table tbody button')[1].click()
    rows = page("[...document.querySelectorAll('#pair-prompts li')].map(li => Number(li.dataset.row))")
    assert set(rows) == {r for r in insp.rows_of(a, pairs.code_a[1]) if insp.codes.head(b)[r] == pairs.code_b[1]}
    choose(page, '#second', str(a))
    assert page.one('#pairs-title').text == 'Choose two different heads'

def test_keyboard_and_labels(page):
    from selenium.webdriver.common.keys import Keys
    page.one('#tab-codes').send_keys(Keys.ARROW_RIGHT)
    assert page.one('#tab-cut').get_attribute('aria-selected') == 'true' and page.one('#cut').is_displayed() and not page.all('#codes')[0].is_displayed()
    page.one('#tab-cut').send_keys(Keys.END)
    assert page.one('#pairs').is_displayed()
    assert page("[...document.querySelectorAll('select, input')].every(e => e.labels.length === 1) && document.documentElement.lang") == 'en'

def test_any_prompt_is_text(browser, tmp_path):
    rows = [dict(positive=f'{w} said "no" </script><b id=bad>&amp;\n café 日本 😀, so {w} gave', negative=f"{w} said 'no' <!-- <script>&amp;\n thé, so {v} gave", answer=' it', wrong=' up')
            for w, v in [('Ann', 'Bob'), ('Tom', 'Sue'), ('Kim', 'Ron'), ('Pat', 'Lee')]]
    model, task = tiny_model(), Task.from_data(rows, '</title><b id=bad>"\'', answer_token='first', equal_length=False)
    insp = inspect_circuit(find_circuit(model, task, score='unique codes', d_sae=20, n_train=4), model)
    file = insp.to_html(tmp_path/'odd "page".html')
    browser.open(file, offline=True).one('#viewer')
    h = insp.heads[0]
    shown = browser("[...document.querySelectorAll('#prompts .text')].map(t => t.textContent)")
    assert shown == [p.text.replace('\n', '⏎\n') for p in insp.prompts_of(h, insp.codes_of(h).code[0], 20)]
    assert not browser.all('#bad') and task.name in browser('document.title')
    browser.one('#tab-cut').click()
    assert 'No ground truth was given' in browser.one('#roc').text
    quiet(browser, file)

def test_small_page_says_what_is_left_out(browser, insp, tmp_path):
    file = insp.to_html(tmp_path/'small.html', heads=insp.heads[:3], max_mb=.045)
    browser.open(file, offline=True).one('#viewer')
    assert file.stat().st_size <= 45_000 and 'the codes of 3 of them' in browser.one('#about').text
    assert len(browser.all('#head option')) == 3
    kept = browser("document.querySelectorAll('#prompts li').length")
    full = len(insp.rows_of(insp.heads[0], insp.codes_of(insp.heads[0]).code[0]))
    assert kept == full or f'{kept} of {full}' in browser.one('#prompts-note').text and 'at most' in browser.one('#about').text
    browser.one('#tab-cut').click()
    assert 'disabled' not in (browser.one('#selected button').get_attribute('outerHTML'))
    quiet(browser, file)

def test_frame_of_a_notebook(browser, insp, tmp_path):
    (tmp_path/'frame.html').write_text(f'<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,">{insp._repr_html_()}', encoding='utf-8')
    browser.open(tmp_path/'frame.html', offline=True)
    browser.driver.switch_to.frame(browser.one('iframe'))
    browser.one('#viewer'); browser.one('#tab-pairs').click()
    assert browser.one('#pairs-title').text.endswith('unique to positives')
    browser.driver.switch_to.default_content()
    assert not browser.messages()
