"""Share what the tests need: the files of the repository, a copy of it, a limit on threads, and a browser."""

import gc
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

# Each test process gets its share of the cores, before PyTorch is imported: threads that wait for a busy core spin.
if 'PYTEST_XDIST_WORKER' in os.environ:
    os.environ.setdefault(
        'OMP_NUM_THREADS', str(max(1, (os.cpu_count() or 1) // int(os.environ['PYTEST_XDIST_WORKER_COUNT'])))
    )

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(
    p for p in (ROOT / 'nbs').rglob('*.ipynb') if not any(s[0] in '._' for s in p.relative_to(ROOT / 'nbs').parts)
)
CHROMIUM_FLAGS = [
    *('headless=new', 'no-sandbox', 'disable-dev-shm-usage', 'disable-gpu', 'window-size=1200,900'),
    *('disable-background-networking', 'no-first-run'),
]
MADE = {'.git', '.venv', '__pycache__', 'build', 'dist', '_docs', '_proc', 'runs'}  # never part of the source


def pytest_collection_modifyitems(items):
    """Put long tests first, so that at the end idle processes find only short ones to take over.

    First the site, whose build keeps a process busy for a minute, then the notebooks, then all other tests.
    """
    order = ['test_site', 'test_notebooks']
    items.sort(key=lambda item: (*order, item.path.stem).index(item.path.stem))


def pytest_collection_finish():
    "Keep the garbage collector from visiting, again and again, what the imports have made."
    gc.collect()
    gc.freeze()


def repo_files():
    "Return every file that is committed or would be, relative to the root of the repository."
    r = subprocess.run(
        ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    files = r.stdout.split('\0') if r.returncode == 0 else [str(p.relative_to(ROOT)) for p in ROOT.rglob('*')]
    return sorted(p for p in map(Path, filter(None, files)) if not MADE & set(p.parts) and (ROOT / p).is_file())


@pytest.fixture
def copy(tmp_path):
    "Return the folder of a copy of the source tree that a test may change."
    for p in repo_files():
        (tmp_path / 'copy' / p).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / p, tmp_path / 'copy' / p)
    return tmp_path / 'copy'


def wait_until(ready, what, seconds=10):
    "Wait until `ready()` returns something true, and return that."
    end = time.monotonic() + seconds
    while not (got := ready()):
        assert time.monotonic() < end, f'waited {seconds} s for {what}'
        time.sleep(0.02)
    return got


def cannot_run(why):
    "Skip the test and say why, or fail if CIRCUIT_SAE_NEEDS_BROWSER is set."
    stop = pytest.fail if os.environ.get('CIRCUIT_SAE_NEEDS_BROWSER') else pytest.skip
    stop(why)


class Browser:
    "Drive a page in headless Chromium through Selenium, and read its errors."

    def __init__(self, driver):
        self.driver = driver
        self.log = []

    def open(self, page, offline=False):
        "Open a file or an address with an empty log; `offline` switches the network off."
        self.driver.get('about:blank')
        self.messages()
        self.requests()
        self.log.clear()
        self.driver.execute_cdp_cmd('Network.enable', {})
        self.driver.execute_cdp_cmd(
            'Network.emulateNetworkConditions',
            dict(offline=offline, latency=0, downloadThroughput=-1, uploadThroughput=-1),
        )
        self.driver.get(page.resolve().as_uri() if isinstance(page, Path) else page)
        return self

    def __call__(self, script, *args):
        "Return the value of a JavaScript expression."
        return self.driver.execute_script(f'return {script}', *args)

    def all(self, css):
        "Return every element that a selector finds."
        return self.driver.find_elements('css selector', css)

    def one(self, css):
        "Wait until an element for the selector is visible, and return it."
        return self.wait(lambda: next((e for e in self.all(css) if e.is_displayed()), None), css)

    def wait(self, ready, what='the page', seconds=10):
        "Wait until `ready()` returns something true, and return that."
        return wait_until(ready, what, seconds)

    def messages(self):
        "Return the warnings and errors since the page was opened, failed requests included."
        self.log += [m['message'] for m in self.driver.get_log('browser') if m['level'] in ('SEVERE', 'WARNING')]
        return self.log

    def requests(self):
        "Return the addresses requested since the last call, the page itself included."
        sent = [json.loads(m['message'])['message'] for m in self.driver.get_log('performance')]
        return [m['params']['request']['url'] for m in sent if m['method'] == 'Network.requestWillBeSent']


@pytest.fixture(scope='session')
def chromium():
    """Yield one Chromium for all tests of a process.

    Without a browser the tests are skipped, or fail if CIRCUIT_SAE_NEEDS_BROWSER is set.
    """

    binary = next(filter(None, map(shutil.which, ['chromium', 'chromium-browser', 'google-chrome'])), None)
    tool = shutil.which('chromedriver')
    if not binary or not tool:
        missing = 'chromedriver' if binary else 'Chromium'
        cannot_run(f'There is no {missing} on this machine. On Debian: apt install chromium chromium-driver')
    try:
        from selenium import webdriver
    except ImportError:
        cannot_run("Selenium is not installed: pip install -e '.[dev]'")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in CHROMIUM_FLAGS:
        options.add_argument(f'--{flag}')
    options.set_capability('goog:loggingPrefs', dict(browser='ALL', performance='ALL'))
    driver = webdriver.Chrome(options, webdriver.ChromeService(tool))  # both named, so that Selenium downloads nothing
    yield driver
    driver.quit()


@pytest.fixture
def browser(chromium):
    "Return a browser with an empty page and an empty log."
    return Browser(chromium).open('about:blank')
