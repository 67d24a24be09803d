"""Import this checkout's package and load the default model, once, in the process that notebooks are forked from.

`notebook_server` names this module as the last of its preloaded modules. A notebook's process shares the memory of the
model until it writes to it. Every call of `load_model` there that asks for this model gets it, with what the package
does once for each model (trials of reruns, checks of the stages) already done.
"""

import gc
import os
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def load_default():
    "Return the folder and the default model, or None if it cannot be loaded; a notebook that needs it says why."
    from circuit_sae.core import InputError
    from circuit_sae.features.sites import resolve_site
    from circuit_sae.models.load import load_model
    from circuit_sae.models.support import FIT_STAGES, check_model
    from circuit_sae.models.weights import registry_folder

    if torch.cuda.is_available():
        return None  # notebooks load it onto the GPU
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    try:
        model = load_model(device='cpu')
        for stage in FIT_STAGES:
            check_model(model, stage)
        resolve_site(model, 'L0H0')
        return str(registry_folder('smollm2-135m')), model
    except InputError:
        return None
    finally:
        torch.set_num_threads(n_threads)


def lend():
    "Let calls of `load_model` that ask for the default model return the loaded one."
    from circuit_sae.models import load

    boot = load._boot
    loaded = dict([LOADED] if LOADED else [])

    def boot_once(where, dtype, place, adapter=None):
        as_loaded = dtype == torch.float32 and place == dict(device='cpu')
        if as_loaded and adapter is None and where in loaded:
            return loaded[where]
        return boot(where, dtype, place, adapter)

    load._boot = boot_once


def forget():
    "Drop the imported package, for a notebook of another checkout."
    for name in [name for name in sys.modules if name.split('.')[0] == 'circuit_sae']:
        del sys.modules[name]


os.environ['IN_TEST'] = '1'
os.environ['PYTORCH_NVML_BASED_CUDA_CHECK'] = '1'  # so that looking for a GPU does not keep forks from using it
sys.path.insert(0, str(ROOT))
from circuit_sae.all import *  # noqa: E402, F403

LOADED = load_default()
gc.collect()
gc.freeze()  # so that the collector of a notebook's process does not visit a million objects that it shares
