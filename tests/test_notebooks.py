"""Run every notebook from top to bottom: one test a notebook, each in its own folder and process."""

import pytest
from conftest import NOTEBOOKS, ROOT
from notebook_server import run_notebook

SECONDS = 600
FIRST = ['certificate', 'tutorials', 'checks', 'verify', 'rerun', 'smollm2', 'planted', 'commands', 'find', 'howto']


def rank(notebook):
    "Sort key: the longest notebooks come first, in the order of the `FIRST` words in their paths."
    path = notebook.relative_to(ROOT / 'nbs').as_posix()
    return next((i for i, word in enumerate(FIRST) if word in path), len(FIRST))


@pytest.mark.parametrize('notebook', sorted(NOTEBOOKS, key=rank), ids=lambda p: p.relative_to(ROOT / 'nbs').as_posix())
def test_notebook(notebook):
    if error := run_notebook(notebook, seconds=SECONDS):
        pytest.fail(error, pytrace=False)
