"What the tests share: where the repository is, its files, a copy of it to work on, and the cores."
import os, shutil, subprocess
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
