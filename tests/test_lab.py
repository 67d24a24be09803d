"""Open notebooks in JupyterLab in headless Chromium: use the controls of an inspector, and the frames of the tutorials.

JupyterLab runs in a folder of its own, with settings and a runtime of its own, on a free port of this machine.
"""

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import urllib.request
from contextlib import suppress

import pytest
from conftest import ROOT, cannot_run, wait_until

CELLS = [
    """
from circuit_sae.features.reading import head_features
from circuit_sae.features.token_acts import Documents
from circuit_sae.find import find_circuit
from circuit_sae.show.inspector import inspect_circuit
from circuit_sae.truth.planted import plant
""",
    """
p = plant('induction', seed=10, n=20)
found = find_circuit(p.model, p.task, d_sae=60, n_epochs=60, confirm=False)
""",
    """
settings = dict(text=Documents(p.task.tokens(p.model).ids[:4]), width=64, k=4, steps=80, n=5, folder='features')
features = head_features(found, found.circuit.heads[0], p.model, **settings)
inspect_circuit(found, p.model, p.truth, features=[features]).widget()
""",
]
SERVER = [
    *('--no-browser', '--allow-root', '--ServerApp.port_retries=0', '--ServerApp.password='),
    *('--IdentityProvider.token=', '--LabApp.expose_app_in_browser=True', '--LabApp.extension_manager=readonly'),
]
# Cells outside the window stay in the page, and no box about news covers it.
SETTINGS = {
    '@jupyterlab/notebook-extension/tracker': dict(windowingMode='none'),
    '@jupyterlab/apputils-extension/notification': dict(fetchNews='false', checkForUpdates=False),
}
TUTORIALS = ['codes', 'features']


def notebook():
    "Return a notebook of `CELLS` as text."
    cells = [
        dict(cell_type='code', id=f'cell{i}', metadata={}, source=source.strip(), execution_count=None, outputs=[])
        for i, source in enumerate(CELLS)
    ]
    kernel = dict(name='python3', display_name='Python 3', language='python')
    return json.dumps(dict(nbformat=4, nbformat_minor=5, metadata=dict(kernelspec=kernel), cells=cells))


def trust(path, data):
    "Sign a notebook as a user does who trusts it; JupyterLab shows no script of other notebooks."
    import nbformat
    from nbformat.sign import NotebookNotary

    NotebookNotary(data_dir=str(data)).sign(nbformat.read(path, 4))


def fill(folder):
    "Write settings of JupyterLab, the notebook of `CELLS` and the tutorials; return the environment of the server."
    for name in ('work', 'data'):
        (folder / name).mkdir()
    for name, values in SETTINGS.items():
        file = folder / 'config/lab/user-settings' / f'{name}.jupyterlab-settings'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    (folder / 'work/controls.ipynb').write_text(notebook())
    for name in TUTORIALS:
        (folder / f'work/{name}.ipynb').write_bytes((ROOT / f'nbs/tutorials/{name}.ipynb').read_bytes())
        trust(folder / f'work/{name}.ipynb', folder / 'data')
    own = {f'JUPYTER_{name}_DIR': str(folder / name.lower()) for name in ('CONFIG', 'DATA', 'RUNTIME')}
    return os.environ | own | dict(IPYTHONDIR=str(folder / 'ipython'), PYTHONPATH=str(ROOT))


def answers(address):
    "Return whether a server answers at this address."
    with suppress(OSError):
        return urllib.request.urlopen(address, timeout=1).status == 200


@pytest.fixture(scope='module')
def lab(chromium, tmp_path_factory):
    "Yield the address of JupyterLab; `chromium` comes first, so that nothing is started without a browser."
    if not importlib.util.find_spec('jupyterlab'):
        cannot_run("JupyterLab is not installed: pip install -e '.[dev]'")
    folder = tmp_path_factory.mktemp('lab')
    environment = fill(folder)
    with socket.create_server(('127.0.0.1', 0)) as s:
        port = s.getsockname()[1]
    where = [f'--ServerApp.port={port}', f'--ServerApp.root_dir={folder / "work"}']
    with open(folder / 'log', 'w') as log:
        command = [sys.executable, '-m', 'jupyterlab', *SERVER, *where]
        server = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    address = f'http://127.0.0.1:{port}'
    try:
        wait_until(lambda: answers(f'{address}/api') or server.poll() is not None, 'JupyterLab', seconds=120)
        assert server.poll() is None, (folder / 'log').read_text()[-4000:]
        yield address
    finally:
        server.terminate()  # its kernels end with it
        server.wait()


def run_all(browser, css):
    "Run all cells of the open notebook and wait for an output; a cell that fails ends the wait."
    # A cell that runs before the kernel is ready opens a box that asks for a kernel.
    status = 'window.jupyterapp?.shell.currentWidget?.context?.sessionContext.session?.kernel?.status'
    browser.wait(lambda: browser(status) == 'idle', 'the kernel', seconds=120)
    browser('(window.jupyterapp.commands.execute("notebook:run-all-cells"), true)')  # without waiting for the end
    error = '.jp-RenderedText[data-mime-type="application/vnd.jupyter.error"]'
    browser.wait(lambda: browser.all(css) or browser.all(error), 'the controls', seconds=240)
    assert not browser.all(error), browser.all(error)[0].text


def texts(browser):
    "Return the texts of the answers that are visible, from top to bottom."
    return [e.text for e in browser.all('.widget-html-content') if e.is_displayed()]


def open_tab(browser, title, expected):
    "Open a tab of the controls by a click, wait for a text of its last answer, and return its answers."
    tabs = browser.all('.jp-OutputArea .widget-tab > .lm-TabBar .lm-TabBar-tab')
    next(tab for tab in tabs if tab.text == title).click()
    browser.wait(lambda: expected in '\n'.join(texts(browser)), f'{expected!r} in {title}', seconds=60)
    return texts(browser)


def test_controls_answer_in_jupyterlab(browser, lab):
    "Every tab answers clicks and keys: another head, a threshold, two heads, features switched off."
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select

    def changed(before, what):
        return browser.wait(lambda: texts(browser) != before and texts(browser), what, seconds=60)

    browser.open(f'{lab}/doc/tree/controls.ipynb')
    run_all(browser, '.jp-OutputArea .widget-tab select')

    first = open_tab(browser, 'Codes and prompts', 'Co-occurring heads')
    assert first[0].splitlines()[0].split() == ['code', 'positives', 'negatives', 'unique']
    heads = Select(browser.one('.widget-dropdown select'))
    best = heads.first_selected_option.text.split()[0]
    assert len(heads.options) == 24
    heads.select_by_index(1)
    changed(first, 'the codes of another head')
    heads.select_by_index(0)
    browser.wait(lambda: texts(browser) == first, 'the codes of the first head', seconds=60)

    flow = open_tab(browser, 'Attribution and edges', 'Strongest edges')[0]
    assert flow.startswith(f'{best}:') and 'By position' in flow

    before = open_tab(browser, 'Threshold', 'false positive rate')
    browser.one('.noUi-handle').send_keys(Keys.HOME)
    lowest = changed(before, 'the heads of the lowest threshold')[0]
    assert lowest.startswith('24 heads') and 'recall 1.000' in lowest

    before = open_tab(browser, 'Two heads', 'unique to positives')
    second = [s for s in browser.all('.widget-dropdown select') if s.is_displayed()][1]
    Select(second).select_by_index(5)
    assert re.match(r'\d+ pairs of codes, \d+ unique', changed(before, 'the codes of two other heads')[0])

    before = open_tab(browser, 'Features', '0 off: ')
    [e for e in browser.all('.noUi-handle') if e.is_displayed()][0].send_keys(Keys.ARROW_RIGHT)
    assert '1 off: ' in '\n'.join(changed(before, 'the prediction without a feature'))
    assert not browser.all('.jp-RenderedText[data-mime-type="application/vnd.jupyter.stderr"]')


@pytest.mark.parametrize('name', TUTORIALS)
def test_tutorial_shows_its_inspector_in_jupyterlab(browser, lab, name):
    "The page that a tutorial shows in a frame answers clicks in JupyterLab too."
    from selenium.webdriver.support.ui import Select

    browser.open(f'{lab}/doc/tree/{name}.ipynb')
    frame = browser.wait(lambda: browser.all('.jp-OutputArea iframe'), 'the inspector', seconds=120)[0]
    browser('arguments[0].scrollIntoView()', frame)
    browser.driver.switch_to.frame(frame)
    title = browser.one('#codes-title').text
    Select(browser.one('#head')).select_by_index(1)
    assert browser.one('#codes-title').text != title
    browser.one('#tab-cut').click()
    assert browser.one('#threshold').is_displayed()
    if name == 'features':
        browser.one('#tab-features').click()
        assert browser.one('#features').text
    browser.driver.switch_to.default_content()
