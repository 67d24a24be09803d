"""Build the site once from a copy of the source, then check its links, its reference and its behaviour in a browser."""

import ast
import functools
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from urllib.parse import unquote, urldefrag

import pytest
from conftest import NOTEBOOKS, ROOT, repo_files
from filelock import FileLock

MODULES = sorted(p for p in (ROOT / 'circuit_sae').rglob('*.py') if p.name[0] != '_')


class Page(HTMLParser):
    "Read a page: its anchors, links, loaded files and text."

    def __init__(self, path):
        super().__init__()
        self.path = path
        self.ids = set()
        self.links = set()
        self.loads = set()
        self.text = []
        self.stack = []
        self.html = path.read_text(encoding='utf-8')
        self.feed(self.html)
        self.text = re.sub(r'\s+', ' ', ''.join(self.text))

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a[k] for k in ('id', 'name') if a.get(k)}
        if tag in ('script', 'style'):
            self.stack.append(tag)
        if tag == 'a' and a.get('href'):
            self.links.add(a['href'])
        if tag != 'a':
            self.loads |= {a[k] for k in ('src', 'href', 'data', 'poster') if a.get(k)}

    def handle_endtag(self, tag):
        if self.stack and self.stack[-1] == tag:
            self.stack.pop()

    def handle_data(self, data):
        if not self.stack:
            self.text.append(data)


@pytest.fixture(scope='session')
def site(tmp_path_factory):
    "Return the folder of the site, which the first test process builds."
    base = tmp_path_factory.getbasetemp()
    if re.fullmatch(r'popen-gw\d+', base.name):
        base = base.parent
    with FileLock(base / 'site.lock'):
        if not (base / 'site/built').exists():
            for p in repo_files():
                (base / 'site' / p).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / p, base / 'site' / p)
            r = subprocess.run(
                [sys.executable, '.ci/docs'],
                cwd=base / 'site',
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
            )
            (base / 'site/built').write_text(
                r.stdout + r.stderr if r.returncode == 0 else f'failed\n{r.stdout}\n{r.stderr}'
            )
    said = (base / 'site/built').read_text()
    assert not said.startswith('failed'), said[-4000:]
    return base / 'site/_docs'


@pytest.fixture(scope='session')
def pages(site):
    return {p.relative_to(site).as_posix(): Page(p) for p in sorted(site.rglob('*.html'))}


@pytest.fixture(scope='session')
def served(site):
    "Serve the site on this machine and yield its address."

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()


def page_of(notebook):
    "Return the page of a notebook."
    return re.sub(r'(^|/)\d+[a-z]?_', r'\1', notebook.relative_to(ROOT / 'nbs').as_posix()).replace('.ipynb', '.html')


def test_the_builder_prints_no_warning(site):
    said = (site.parent / 'built').read_text()
    assert re.fullmatch(r'\d+ pages in _docs/\n', said), said


def test_every_notebook_is_a_page(pages):
    assert not {page_of(p) for p in NOTEBOOKS} - set(pages)


def test_links_and_pictures_resolve(site, pages):
    broken = []
    for name, page in pages.items():
        for link in page.links | page.loads:
            if re.match(r'(https?|mailto|data|javascript):', link):
                continue
            file, anchor = urldefrag(link)
            target = (page.path.parent / unquote(file)).resolve() if file else page.path
            if target.is_dir():
                target /= 'index.html'
            there = pages.get(target.relative_to(site).as_posix()) if target.is_relative_to(site) else None
            if not target.exists() or anchor and there and unquote(anchor) not in there.ids:
                broken.append((name, link))
    assert not broken


def test_nothing_is_loaded_from_elsewhere(site, pages):
    assert not [(n, x) for n, p in pages.items() for x in p.loads if re.match(r'(https?:)?//', x)]
    assert not [n for n, p in pages.items() if re.search(r'url\(\s*(["\']|&quot;)?(https?:)?//', p.html)]
    assert not [
        (p.name, x)
        for p in site.rglob('*.css')
        for x in re.findall(r'url\(\s*["\']?((?:https?:)?//[^)]*)|@import\s+(\S+)', p.read_text(encoding='utf-8'))
    ]


def test_no_link_leads_to_the_published_copy(pages):
    assert not [(n, x) for n, p in pages.items() for x in p.links if 'circuit-sae.github.io' in x]


def test_pages_say_what_the_notebooks_say(pages):
    "Check that no heading is lost, and nothing of the cell with the title."
    lost = []
    for nb in NOTEBOOKS:
        cells = [
            ''.join(c['source'])
            for c in json.loads(nb.read_text(encoding='utf-8'))['cells']
            if c['cell_type'] == 'markdown'
        ]
        prose = [re.sub(r'```.*?```', '', c, flags=re.S) for c in cells]
        phrases = re.findall(r'[a-z]+(?:[ \n][a-z]+){3,}', prose[0])[-1:] + [
            m for c in prose if '\n' in c.strip() for m in re.findall(r'^#{2,4} ([\w ,]+)$', c, re.M)
        ]
        lost += [(nb.name, x) for x in phrases if re.sub(r'\s+', ' ', x).strip() not in pages[page_of(nb)].text]
    assert not lost


def test_formulas_are_drawn_without_a_script(pages):
    assert sum('<math' in p.html for p in pages.values()) > 10
    assert not [n for n, p in pages.items() if re.search(r'class="math \w+">\\', p.html)]
    assert not [
        (n, m)
        for n, p in pages.items()
        for m in re.findall(r'<math.*?</math>', p.html, re.S)
        if '\\' in re.sub(r'<[^>]+>', '', m)
    ]


def documented(module):
    "Return the names that a module exports and defines, with the line of each."
    tree = ast.parse(module.read_text(encoding='utf-8'))
    names = next(
        (ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == '__all__'), []
    )
    return {n.name: n.lineno for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name in names}


def module_page(module):
    return page_of(
        ROOT / 'nbs' / re.search(r'^# AUTOGENERATED.*nbs/(\S+\.ipynb)', module.read_text(encoding='utf-8'), re.M)[1]
    )


@pytest.mark.parametrize('module', [m for m in MODULES if documented(m)], ids=lambda p: p.stem)
def test_every_name_is_documented(pages, module):
    "Check that each name has a signature and a link to its source."
    page = pages[module_page(module)]
    for name, line in documented(module).items():
        assert name.lower() in page.ids, f'{name} has no place on its page'
        assert any(
            re.fullmatch(rf'https://github\.com/\S+/{module.relative_to(ROOT).as_posix()}#L\d+', x) for x in page.links
        )
        assert re.search(rf'(def|class) {name}\b', page.text), f'{name} has no signature'


def test_glossary_has_every_word(pages):
    words = """code null-code latent node-score edge-score pair-head-count share-softmax-and-threshold p-q-and-p_max
        positive-negative logit_diff effect roc-auc average-precision f1 pseudo-f1 faithfulness completeness minimality
        activation-patching attribution-patching eap-ig path-patching mean-difference paired-difference""".split()
    assert not [w for w in words if w not in pages['glossary.html'].ids]


# In a browser


def outside(browser, served):
    return [u for u in browser.requests() if not u.startswith((served, 'data:', 'blob:', 'about:', 'chrome'))]


OPEN_IN_FRAMES = """
const [addresses, hidden, done] = arguments
const opened = addresses.map(address => new Promise(loaded => {
  const frame = document.createElement('iframe')
  frame.style = 'position: absolute; left: -2000px; width: 1200px; height: 900px'  // outside: nothing is drawn
  frame.hidden = hidden
  frame.src = address
  frame.onload = () => setTimeout(() => loaded(frame), 20)
  document.body.prepend(frame)
}))
Promise.all(opened).then(frames => { frames.forEach(frame => frame.remove()); done() })
"""


def scripts(page):
    "Return the scripts of a page, with addresses as from the root of the site."
    return [re.sub(r'"(\.\./)+', '"', script) for script in re.findall(r'<script.*?</script>', page.html, re.S)]


def complaints(browser, served, names, hidden):
    "Open pages in frames, all at once; return their warnings and errors, and their requests of another machine."
    browser.driver.execute_async_script(OPEN_IN_FRAMES, [served + name for name in names], hidden)
    said = list(browser.messages())
    browser.log.clear()
    return said + outside(browser, served)


def test_every_page_opens(browser, served, pages):
    """Check that no script fails and no request leaves this machine.

    A page in a frame costs a fourth of one in a tab, and half of that in a hidden frame, where scripts run but nothing
    is laid out. Pages that hold a viewer, or have other scripts than index.html, are laid out, as index.html is. Pages
    of a group with a complaint are opened again one by one, to find out which it was.
    """
    browser.open(served + 'index.html')
    amiss = [('index.html', said) for said in browser.messages()]
    usual = scripts(pages['index.html'])
    shown = [name for name, page in pages.items() if '<iframe' in page.html or scripts(page) != usual]
    for names, hidden in ((shown, False), ([name for name in pages if name not in shown], True)):
        for start in range(0, len(names), 8):
            group = names[start : start + 8]
            if said := complaints(browser, served, group, hidden):
                by_page = [(name, complaints(browser, served, [name], hidden)) for name in group]
                amiss += [(name, one) for name, one in by_page if one] or [(group, said)]
    assert not amiss


def search(browser, words):
    "Type into the search box and wait for results."
    box = browser.one('.smalldocs-search input')
    box.clear()
    box.send_keys(words)
    browser.wait(lambda: browser.all('.smalldocs-search-results.show a'), f'results for {words}')
    return box


@pytest.mark.parametrize(
    'word, page',
    [
        ('node_scores', 'score/unique_codes.html#node_scores'),
        ('patch_heads', 'causal/patching.html#patch_heads'),
        ('average precision', 'glossary.html#average-precision'),
    ],
)
def test_search_lands_on_the_page(browser, served, word, page):
    browser.open(f'{served}howto/cluster.html')
    search(browser, word).send_keys('\ue007')  # Enter
    browser.wait(
        lambda: browser.driver.current_url == served + page, f'{page}, but this is {browser.driver.current_url}'
    )
    assert not browser.messages() and not outside(browser, served)


def test_search_finds_every_name(browser, served):
    "Check for every thirtieth name that the search lists its own section first."
    browser.open(f'{served}index.html')
    search(browser, 'find_circuit')
    names = {n: module_page(m) for m in MODULES for n in documented(m)}
    names = dict(list(names.items())[::30])
    found = browser(
        """(async names => {
            const index = await (await fetch("search.json")).json()
            const keys = [{name: "title", weight: 2}, {name: "section", weight: 2}, {name: "text", weight: 1}]
            const fuse = new Fuse(index, {keys, ignoreLocation: true, threshold: 0.3, minMatchCharLength: 2})
            return names.map(n => fuse.search(n, {limit: 1})[0]?.item.href)
        })(arguments[0])""",
        list(names),
    )
    assert not [
        (n, f) for n, f in zip(names, found) if not re.fullmatch(rf'[\w/]+\.html#{n.lower()}(-\d)?', f or '')
    ]  # its own section, or a heading of another page that has the name too


def test_search_works_from_disk(browser, site):
    browser.open(site / 'tutorials/ioi.html', offline=True)
    search(browser, 'verify_circuit').send_keys('\ue007')
    browser.wait(lambda: browser.driver.current_url.endswith('/verify.html#verify_circuit'), 'verify.html')
    assert not browser.messages()


@pytest.mark.parametrize('page', ['show/viewer.html', 'tutorials/codes.html'])
def test_live_viewer_answers(browser, served, page):
    "Choose another head, a code and another threshold in the inspector of a page."
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select

    browser.open(served + page).driver.switch_to.frame(browser.one('iframe'))
    try:
        heads = Select(browser.one('#viewer #head'))
        for i in range(1, len(heads.options)):  # a head with several codes
            name = heads.options[i].text.split()[0]
            assert not browser.one('#codes-title').text.startswith(name)
            heads.select_by_index(i)
            assert browser.one('#codes-title').text.startswith(f'{name}:')
            if len(browser.all('#code-table tbody button')) > 1:
                break
        before = browser.one('#prompts').text
        browser.all('#code-table tbody button')[1].send_keys(
            Keys.ENTER
        )  # by keyboard: the bar at the top of the page may lie over the frame
        assert name in browser.one('#prompts-title').text and browser.one('#prompts').text != before
        browser.one('#tab-cut').send_keys(Keys.ENTER)
        taken = len(browser.all('#selected button'))
        browser.one('#threshold').send_keys(Keys.END)
        assert 0 < len(browser.all('#selected button')) < taken
    finally:
        browser.driver.switch_to.default_content()
    assert not browser.messages() and not outside(browser, served)


@pytest.mark.parametrize('width', [1280, 400])
@pytest.mark.parametrize('page', ['show/viewer.html', 'tutorials/codes.html'])
def test_live_viewer_is_filled_and_unclipped(browser, served, page, width):
    "The frame lies inside the window, each of its views fills a good part of it, and none is wider than the frame."
    metrics = dict(width=width, height=900, deviceScaleFactor=1, mobile=False)
    browser.driver.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', metrics)
    try:
        frame = browser.open(served + page).one('iframe')
        left, right, height = browser('(r => [r.left, r.right, r.height])(arguments[0].getBoundingClientRect())', frame)
        assert 0 <= left and right <= browser('document.documentElement.clientWidth') + 1 and height > 500
        browser.driver.switch_to.frame(frame)
        browser.one('#viewer')
        for tab, least in dict(codes=0.5, cut=0.25, pairs=0.1).items():
            browser(f"document.querySelector('#tab-{tab}').click()")
            wide, inside = browser('[document.documentElement.scrollWidth, document.documentElement.clientWidth]')
            filled = browser(f"document.querySelector('#{tab}').getBoundingClientRect().height")
            assert wide <= inside + 1, f'{tab}: {wide} pixels in a frame of {inside}'
            assert filled > least * height, f'{tab}: {filled} pixels in a frame of {height}'
    finally:
        browser.driver.switch_to.default_content()
        browser.driver.execute_cdp_cmd('Emulation.clearDeviceMetricsOverride', {})
