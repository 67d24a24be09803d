"Every notebook runs from top to bottom: one test a notebook, each in its own folder and in a process of its own."
import os, subprocess, sys
from pathlib import Path
import pytest
from conftest import NOTEBOOKS, ROOT

SECONDS = 1200
RUN = """import sys
from pathlib import Path
from nbdev.config import get_config
from nbdev.test import test_nb
cfg = get_config()
sys.exit(not test_nb(Path(sys.argv[1]), skip_flags=cfg.tst_flags.split(), basepath=cfg.config_path)[0])"""

LONG = ['ioi', 'transfer', 'lookalikes', 'meaning', '10_patching', '16_sae', '24_cli'] # begin with these, so that none of them is left for the end

@pytest.mark.parametrize('notebook', sorted(NOTEBOOKS, key=lambda p: p.stem not in LONG), ids=lambda p: p.relative_to(ROOT/'nbs').as_posix())
def test_notebook(notebook):
    env = {**os.environ, 'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'}
    try: r = subprocess.run([sys.executable, '-c', RUN, str(notebook)], cwd=notebook.parent, env=env, timeout=SECONDS,
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except subprocess.TimeoutExpired: pytest.fail(f'{notebook.name} did not end within {SECONDS} s', pytrace=False)
    if r.returncode: pytest.fail(f'{notebook.name}\n{r.stdout[-8000:]}', pytrace=False)
