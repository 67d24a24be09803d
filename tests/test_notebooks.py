"""Run every notebook from top to bottom: one test a notebook, each in its own folder and process."""

import pytest
from conftest import NOTEBOOKS, ROOT
from notebook_server import run_notebook

SECONDS = 600
FIRST = ['tutorials', 'cli', 'certificate', 'viewer', 'checks']  # the longest notebooks start first


def rank(notebook):
    "Sort key: notebooks with one of the `FIRST` words in their path come first."
    return not any(word in str(notebook.relative_to(ROOT / 'nbs')) for word in FIRST)


@pytest.mark.parametrize('notebook', sorted(NOTEBOOKS, key=rank), ids=lambda p: p.relative_to(ROOT / 'nbs').as_posix())
def test_notebook(notebook):
    if error := run_notebook(notebook, seconds=SECONDS):
        pytest.fail(error, pytrace=False)
