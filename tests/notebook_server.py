"""Run notebooks in processes forked from one that has imported the libraries.

A notebook takes about nine seconds of processor time to import PyTorch, Transformers and TransformerLens. The fork
server of the standard library imports them once; a fork costs milliseconds. It also loads the default model once
(`warm.py`), on one thread, so that no thread pool is lost in a fork.

    python tests/notebook_server.py nbs/score/03_flow.ipynb    run a notebook and save its outputs
"""

import multiprocessing
import os
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

PRELOAD = [
    *('torch', 'numpy', 'pandas', 'matplotlib.pyplot', 'safetensors.torch', 'scipy.stats', 'sklearn.linear_model'),
    *('transformers', 'transformers.models.llama.modeling_llama', 'tokenizers', 'gguf', 'accelerate', 'ipywidgets'),
    *('transformer_lens.model_bridge', 'transformer_lens.config', 'transformer_lens.model_bridge.sources.native'),
    *('nbdev.test', 'nbdev.showdoc', 'execnb.shell', 'fastcore.test', 'tqdm.auto', 'warm'),
]


def context():
    "Return a multiprocessing context whose processes have the libraries imported."
    ctx = multiprocessing.get_context('forkserver')
    ctx.set_forkserver_preload(PRELOAD)
    paths = os.environ.get('PYTHONPATH')
    here = str(Path(__file__).resolve().parent)
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, [here, paths]))):
        forkserver.ensure_running()
    return ctx


def _use_warm(path, root):
    "Use the package and the model that the fork server has loaded, unless the notebook is about loading or elsewhere."
    warm = sys.modules.get('warm')
    if warm and warm.ROOT != root:
        warm.forget()
    elif warm and path.parent.name != 'models':
        warm.lend()


def _renew_thread_pool():
    """Make the thread pool of this process, in its only thread.

    A fork has no threads. PyTorch replaces its pool when a thread first asks for it, and fails ("Invalid thread pool!")
    if two new threads ask at the same time, as those that read weights do.
    """
    import torch

    torch.set_num_threads(torch.get_num_threads())


def _draw_only(figure):
    "Draw a figure without layout and pixels, which take most of the time; return an empty image."
    engine = figure.get_layout_engine()
    figure.set_layout_engine('none')
    figure.draw_without_rendering()
    if engine:
        figure.set_layout_engine(engine)
    return ''


def _show_nothing(shell):
    "Let `shell` draw figures without making images of them."
    from matplotlib.figure import Figure

    shell.display_formatter.formatters['image/png'].for_type(Figure, _draw_only)


def _run(notebook, save, log):
    "Run a notebook in this process; write what it prints, and its error, to `log`."
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    from execnb.nbio import read_nb, write_nb
    from execnb.shell import CaptureShell

    path = Path(notebook).resolve()
    root = next(p for p in path.parents if (p / 'settings.ini').exists())
    sys.path.insert(0, str(root))
    os.environ['IN_TEST'] = '1'
    os.environ['PATH'] = os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])
    os.environ['PYTHONPATH'] = str(root)  # for the processes that a notebook starts
    os.chdir(path.parent)
    _renew_thread_pool()
    _use_warm(path, root)
    nb = read_nb(path)
    shell = CaptureShell(path)
    if not save:
        _show_nothing(shell)
    try:
        shell.run_all(nb, exc_stop=True, preproc=lambda c: c.cell_type != 'code' or 'nbdev_export' + '(' in c.source)
    except BaseException:
        print(shell.prettytb(fname=path), flush=True)
        sys.exit(1)
    if save:
        for cell in nb.cells:
            cell.pop('idx_', None)
        write_nb(nb, path)


def run_notebook(
    notebook,  # Path of the notebook
    save: bool = False,  # Write the outputs back into the notebook?
    seconds: float = None,  # Stop after so long; default: never
) -> str:  # The error, or an empty string
    "Run a notebook from top to bottom in its folder."
    with tempfile.NamedTemporaryFile() as log:
        process = context().Process(target=_run, args=(str(notebook), save, log.name))
        process.start()
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
            return f'{notebook} did not end within {seconds} s'
        text = Path(log.name).read_text(errors='replace')
    return '' if process.exitcode == 0 else f'{notebook}: exit status {process.exitcode}\n{text[-8000:]}'


if __name__ == '__main__':
    failures = [error for name in sys.argv[1:] if (error := run_notebook(name, save=True))]
    if not failures:
        from nbdev.clean import nbdev_clean

        for name in sys.argv[1:]:
            nbdev_clean(name)
    sys.exit('\n'.join(failures) or 0)
