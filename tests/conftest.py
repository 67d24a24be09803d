"What the tests share: where the repository is, its files, a copy of it to work on, the cores, and a browser."
import json, os, shutil, subprocess, time
from pathlib import Path

# Test processes that share the cores get their part of them: threads that wait for each other's core spin, and everything takes many times longer.
if 'PYTEST_XDIST_WORKER' in os.environ:
    os.environ.setdefault('OMP_NUM_THREADS', str(max(1, (os.cpu_count() or 1)//int(os.environ['PYTEST_XDIST_WORKER_COUNT'])))) # before torch is imported

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if not any(s[0] in '._' for s in p.relative_to(ROOT/'nbs').parts))
MADE = {'.git', '.venv', '__pycache__', 'build', 'dist', '_docs', '_proc', 'runs'} # never part of the source

def repo_files():
    "Every file that is committed or would be, relative to the top."
    r = subprocess.run(['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'], cwd=ROOT, capture_output=True, text=True)
    files = r.stdout.split('\0') if r.returncode == 0 else [str(p.relative_to(ROOT)) for p in ROOT.rglob('*')]
    return sorted(p for p in map(Path, filter(None, files)) if not MADE & set(p.parts) and (ROOT/p).is_file())

@pytest.fixture
def copy(tmp_path):
    "A copy of the source tree that a test may change."
    for p in repo_files():
        (tmp_path/'copy'/p).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT/p, tmp_path/'copy'/p)
    return tmp_path/'copy'

class Browser:
    "A headless Chromium, Selenium's `driver`, with short ways to drive a page and to read what went wrong."
    def __init__(self, driver): self.driver, self.log = driver, []

    def open(self, page, offline=False):
        "Open a file or an address, from an empty log; `offline`: with the network taken away."
        self.driver.get('about:blank'); self.messages(); self.requests(); self.log.clear()
        self.driver.execute_cdp_cmd('Network.enable', {})
        self.driver.execute_cdp_cmd('Network.emulateNetworkConditions', dict(offline=offline, latency=0, downloadThroughput=-1, uploadThroughput=-1))
        self.driver.get(page.resolve().as_uri() if isinstance(page, Path) else page)
        return self

    def __call__(self, script, *args):
        "What a line of JavaScript gives."
        return self.driver.execute_script(f'return {script}', *args)

    def all(self, css):
        "Every element that a selector finds."
        return self.driver.find_elements('css selector', css)

    def one(self, css):
        "The element that a selector finds, as soon as it is there and can be seen."
        return self.wait(lambda: next((e for e in self.all(css) if e.is_displayed()), None), css)

    def wait(self, ready, what='the page', seconds=10):
        "What `ready()` returns, once that is true."
        end = time.monotonic() + seconds
        while not (got := ready()):
            assert time.monotonic() < end, f'waited {seconds} s for {what}'
            time.sleep(.02)
        return got

    def messages(self):
        "Warnings and errors of scripts since the page was opened, those of refused or missing files included."
        self.log += [m['message'] for m in self.driver.get_log('browser') if m['level'] in ('SEVERE', 'WARNING')]
        return self.log

    def requests(self):
        "Addresses asked for since the last look; the page itself, `data:` and `blob:` among them."
        sent = [json.loads(m['message'])['message'] for m in self.driver.get_log('performance')]
        return [m['params']['request']['url'] for m in sent if m['method'] == 'Network.requestWillBeSent']

@pytest.fixture(scope='session')
def chromium():
    "One Chromium for all tests of a process; without it they are skipped, or fail where CIRCUIT_SAE_NEEDS_BROWSER is set."
    def without(why): (pytest.fail if os.environ.get('CIRCUIT_SAE_NEEDS_BROWSER') else pytest.skip)(f'no browser to drive the page in: {why}')
    binary, tool = next(filter(None, map(shutil.which, ['chromium', 'chromium-browser', 'google-chrome'])), None), shutil.which('chromedriver')
    if not binary or not tool: without(f"no {'Chromium' if not binary else 'chromedriver'} on this machine. On Debian: apt install chromium chromium-driver")
    try: from selenium import webdriver
    except ImportError: without("selenium is not installed: pip install -e '.[dev]'")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for o in ('headless=new', 'no-sandbox', 'disable-dev-shm-usage', 'disable-gpu', 'window-size=1200,900', 'disable-background-networking', 'no-first-run'): options.add_argument(f'--{o}')
    options.set_capability('goog:loggingPrefs', dict(browser='ALL', performance='ALL'))
    driver = webdriver.Chrome(options, webdriver.ChromeService(tool)) # both named: nothing is looked for elsewhere
    yield driver
    driver.quit()

@pytest.fixture
def browser(chromium):
    "A browser at an empty page with an empty log."
    return Browser(chromium).open('about:blank')
