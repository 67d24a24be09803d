__version__ = "0.1.0"

from importlib import import_module as _import_module


def __getattr__(name):
    "Import a public name when it is first used; `circuit_sae.all` lists them."
    if name.startswith('_') or name == 'all':
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(_import_module('circuit_sae.all'), name)


def __dir__():
    return sorted({*globals(), *_import_module('circuit_sae.all').__all__})
