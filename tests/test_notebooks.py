"""Run every notebook from top to bottom: one test a notebook, each in its own folder and process."""

import pytest
from conftest import NOTEBOOKS, ROOT
from notebook_server import run_notebook

SECONDS = 600
FIRST = [  # by the processor time that they take
    *('tutorials/features', 'certificate', 'tutorials', 'verify', 'smollm2', 'faithfulness', '02_train', 'fdr'),
    *('codes/', 'checks', 'ideas', 'commands', 'calibration', 'show/', 'howto', 'planted'),
    *('score/', 'models/05', 'causal'),
]


def rank(notebook):
    "Sort key: the longest notebooks come first, in the order of the `FIRST` words in their paths."
    path = notebook.relative_to(ROOT / 'nbs').as_posix()
    return next((i for i, word in enumerate(FIRST) if word in path), len(FIRST))


@pytest.mark.parametrize('notebook', sorted(NOTEBOOKS, key=rank), ids=lambda p: p.relative_to(ROOT / 'nbs').as_posix())
def test_notebook(notebook):
    if error := run_notebook(notebook, seconds=SECONDS):
        pytest.fail(error, pytrace=False)
