"Open JupyterLab in headless Chromium, run a notebook that shows the controls of an inspector, and use them."

import importlib.util
import json
import os
import socket
import subprocess
import sys
import urllib.request
from contextlib import suppress

import pytest
from conftest import ROOT, cannot_run, wait_until

CELLS = [
    """
from circuit_sae.find import find_circuit
from circuit_sae.models.load import tiny_model
from circuit_sae.data.prompts import induction_task
from circuit_sae.show.inspector import inspect_circuit
""",
    """
model = tiny_model()
found = find_circuit(model, induction_task(n=12), score='unique codes', d_sae=20, n_train=6, n_epochs=5, top_k=4)
inspect_circuit(found, model).widget()
""",
]
SETTINGS = [
    *(
        '--no-browser',
        '--allow-root',
        '--ServerApp.port_retries=0',
        '--IdentityProvider.token=',
        '--ServerApp.password=',
    ),
    *('--LabApp.expose_app_in_browser=True', '--LabApp.extension_manager=readonly', '--LabApp.news_url='),
]


def notebook():
    "Return a notebook of `CELLS` as text."
    cells = [
        dict(cell_type='code', id=f'cell{i}', metadata={}, source=source.strip(), execution_count=None, outputs=[])
        for i, source in enumerate(CELLS)
    ]
    kernel = dict(name='python3', display_name='Python 3', language='python')
    return json.dumps(dict(nbformat=4, nbformat_minor=5, metadata=dict(kernelspec=kernel), cells=cells))


def answers(address):
    "Return whether a server answers at this address."
    with suppress(OSError):
        return urllib.request.urlopen(address, timeout=1).status == 200


@pytest.fixture
def lab(tmp_path):
    "Yield the address of JupyterLab in a folder with one notebook, without any setting of the user."
    if not importlib.util.find_spec('jupyterlab'):
        cannot_run("JupyterLab is not installed: pip install -e '.[dev]'")
    (tmp_path / 'work').mkdir()
    (tmp_path / 'work/inspector.ipynb').write_text(notebook())
    own = {f'JUPYTER_{name}_DIR': str(tmp_path / name.lower()) for name in ('CONFIG', 'DATA', 'RUNTIME')}
    own |= dict(IPYTHONDIR=str(tmp_path / 'ipython'), PYTHONPATH=str(ROOT))
    with socket.create_server(('127.0.0.1', 0)) as s:
        port = s.getsockname()[1]
    where = [f'--ServerApp.port={port}', f'--ServerApp.root_dir={tmp_path / "work"}']
    with open(tmp_path / 'log', 'w') as log:
        command = [sys.executable, '-m', 'jupyterlab', *SETTINGS, *where]
        server = subprocess.Popen(command, env=os.environ | own, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    address = f'http://127.0.0.1:{port}'
    try:
        wait_until(lambda: answers(f'{address}/api') or server.poll() is not None, 'JupyterLab', seconds=180)
        assert server.poll() is None, (tmp_path / 'log').read_text()[-4000:]
        yield address
    finally:
        server.terminate()  # which ends its kernels too
        server.wait()


def test_controls_answer_in_jupyterlab(browser, lab):
    "Choose another head, and move the threshold by keyboard: the outputs change, and come back with the choice."
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select

    browser.open(f'{lab}/lab/tree/inspector.ipynb')
    browser.wait(lambda: len(browser.all('.jp-Notebook .jp-CodeCell')) == len(CELLS), 'the notebook', seconds=180)
    browser('(window.jupyterapp.commands.execute("notebook:run-all-cells"), true)')  # without waiting for the end
    browser.wait(lambda: browser.all('.jp-OutputArea .widget-tab select'), 'the controls', seconds=300)

    heads = Select(browser.one('.widget-dropdown select'))
    codes = browser.one('.widget-html-content')
    before = codes.text
    assert before.splitlines()[0].split() == ['code', 'positives', 'negatives', 'unique']
    heads.select_by_index(1)
    browser.wait(lambda: codes.text != before, 'the codes of another head')
    heads.select_by_index(0)
    browser.wait(lambda: codes.text == before, 'the codes of the first head')

    browser.one('.widget-tab .lm-TabBar-tab:nth-child(2)').click()
    handle = browser.one('.noUi-handle')
    selected = browser.one('.widget-html-content')
    before = selected.text
    handle.send_keys(Keys.HOME)
    browser.wait(lambda: selected.text != before, 'the heads of another threshold')
    assert not browser.all('.jp-RenderedText[data-mime-type="application/vnd.jupyter.stderr"]')
