__version__ = "0.1.0"

import os as _os
from importlib import import_module as _import_module

# Threads of PyTorch that wait should sleep instead of spin: on a machine with other busy processes, spinning makes the
# training of an autoencoder several times slower. OpenMP reads this variable when PyTorch is imported.
_os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')


def __getattr__(name):
    "Import a public name when it is first used; `circuit_sae.all` lists them."
    if name.startswith('_') or name == 'all':
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(_import_module('circuit_sae.all'), name)


def __dir__():
    return sorted({*globals(), *_import_module('circuit_sae.all').__all__})
