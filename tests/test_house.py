"""Check the rules that CONTRIBUTING.md states: what is exported, how code is laid out, which way imports point."""

import ast
import json
import re
import runpy
import subprocess
import sys
from collections import defaultdict
from functools import cache

import pytest
import yaml
from conftest import NOTEBOOKS, ROOT, repo_files

LIB = ROOT / 'circuit_sae'
MODULES = sorted(p for p in LIB.rglob('*.py') if p.name not in ('__init__.py', '_modidx.py'))

# An import at the top of a module may only point to an entry before its own, or to an earlier notebook of its package.
LAYERS = [
    *('core', 'stats', 'results', 'data', 'models', 'score', 'codes', 'causal', 'truth', 'features', 'circuit', 'find'),
    *('trust', 'show', 'bench', 'commands', 'cli', 'all', '__main__'),
]
MAX_LINE = 120
MAX_FUNCTION = 40
MAX_PUBLIC = 60


def python(code, cwd):
    "Run `code` in a new Python process and return what it prints; fail with its error."
    r = subprocess.run([sys.executable, '-c', code], cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert r.returncode == 0, r.stderr[-4000:]
    return r.stdout


@cache
def code_cells(notebook):
    "Return the number and the source of each code cell."
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    return [(i, ''.join(c['source'])) for i, c in enumerate(cells) if c['cell_type'] == 'code']


def export_cells(notebook):
    "Yield the number and the lines of each exported cell, without its directive."
    for i, source in code_cells(notebook):
        if re.match(r'#\|\s*export', source):
            yield i, source.rstrip().split('\n')[1:]


def dotted(module):
    "Return the name of a module below `circuit_sae`, such as `score.flow`."
    return '.'.join(module.relative_to(LIB).with_suffix('').parts)


@cache
def notebook_order():
    "Return the modules in the order of their notebooks, package by package in the order of `LAYERS`."
    found = [re.search(r'^#\|\s*default_exp\s+(\S+)', s, re.M) for nb in NOTEBOOKS for _, s in code_cells(nb)]
    return sorted((m[1] for m in found if m), key=lambda name: LAYERS.index(name.split('.')[0]))


@cache
def tree(module):
    "Return the syntax tree of a module."
    return ast.parse(module.read_text(encoding='utf-8'))


def imports(module, top_level=True):
    "Yield (imported module, name) for each import of this package, at the top of a module or anywhere."
    package = ['circuit_sae', *module.relative_to(LIB).parts[:-1]]
    for node in tree(module).body if top_level else ast.walk(tree(module)):
        if not isinstance(node, ast.ImportFrom):
            continue
        base = package[: len(package) - node.level + 1] if node.level else []
        source = '.'.join([*base, *filter(None, [node.module])])
        if source.split('.')[0] == 'circuit_sae':
            source = source.removeprefix('circuit_sae').lstrip('.')
            for alias in node.names:
                is_package = source and (LIB / source.replace('.', '/')).is_dir()
                yield (f'{source}.{alias.name}', alias.name) if is_package else (source, alias.name)


def public_names(module):
    "Return the names in `__all__` of a module."
    for node in tree(module).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == '__all__':
            return ast.literal_eval(node.value) if isinstance(node.value, ast.List) else []
    return []


# What is exported


def test_export_changes_nothing(copy):
    for p in (copy / 'circuit_sae').rglob('*.py'):
        if p.name != '__init__.py':
            p.unlink()
    python('from nbdev.doclinks import nbdev_export; nbdev_export()', copy)
    made, kept = (
        {p.relative_to(d).as_posix(): p.read_text(encoding='utf-8') for p in d.rglob('*.py')}
        for d in (copy / 'circuit_sae', LIB)
    )
    assert sorted(made) == sorted(kept)
    assert not [n for n in made if made[n] != kept[n]], 'run nbdev_export'


def test_notebooks_are_clean(copy):
    python('from nbdev.clean import nbdev_clean; nbdev_clean()', copy)
    changed = [p.name for p in NOTEBOOKS if (copy / p.relative_to(ROOT)).read_bytes() != p.read_bytes()]
    assert not changed, 'run nbdev_clean'


def test_every_module_has_a_notebook_in_its_folder():
    wrong = []
    for nb in NOTEBOOKS:
        for _, source in code_cells(nb):
            if m := re.search(r'^#\|\s*default_exp\s+(\S+)', source, re.M):
                own = re.sub(r'^\d+_', '', nb.stem)
                if m[1].split('.') != [*nb.relative_to(ROOT / 'nbs').parts[:-1], own]:
                    wrong.append((nb.name, m[1]))
    assert not wrong
    assert sorted(map(dotted, MODULES)) == sorted(notebook_order())


# Layout of the code


def test_ruff_finds_nothing():
    for command in ['check'], ['format', '--check']:
        r = subprocess.run([sys.executable, '-m', 'ruff', *command, '.'], cwd=ROOT, capture_output=True, text=True)
        assert r.returncode == 0, r.stdout[-4000:] + r.stderr[-2000:]


@pytest.mark.parametrize('module', MODULES, ids=dotted)
def test_functions_fit_on_a_screen(module):
    functions = [n for n in ast.walk(tree(module)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    long = [(f.name, n) for f in functions if (n := f.end_lineno - f.lineno + 1) > MAX_FUNCTION]
    assert not long


def test_export_cells_are_short():
    sizes = [len(lines) for nb in NOTEBOOKS for _, lines in export_cells(nb)]
    long = sum(n > 20 for n in sizes)
    assert long < 0.08 * len(sizes), f'{long} of {len(sizes)} exported cells have more than 20 lines'


def test_lines_are_short():
    long = []
    for nb in NOTEBOOKS:
        for i, source in code_cells(nb):
            long += [(nb.name, i) for line in source.split('\n') if len(line) > MAX_LINE]
    for p in repo_files():
        if p.suffix == '.py' and p.name != '_modidx.py' or p.parts[0] == '.ci':
            text = (ROOT / p).read_text()
            if p.parts[0] == 'circuit_sae':  # the list of names above the first cell is written by nbdev
                text = text[text.find('\n# %% ..') :]
            long += [(str(p), line) for line in text.split('\n') if len(line) > MAX_LINE]
    assert not long


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda p: p.stem)
def test_imports_have_cells_of_their_own(notebook):
    "By itself, nbdev runs each cell with an import when it builds a page, so such a cell may hold nothing else."

    def mixed(source):
        if 'nbdev_export()' in source or re.search(r'^#\|\s*(export|exporti|eval:)', source, re.M):
            return False
        nodes = list(ast.walk(ast.parse(re.sub(r'^(\s*)[!%].*$', r'\1pass', source, flags=re.M))))
        has_import = any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in nodes)
        return has_import and any(isinstance(n, (ast.Expr, ast.Assign)) for n in nodes)

    assert not [f'cell {i}: {s.splitlines()[0]}' for i, s in code_cells(notebook) if mixed(s)]


# Dependencies between modules


@pytest.mark.parametrize('module', MODULES, ids=dotted)
def test_imports_point_one_way(module):
    order = notebook_order()
    earlier = set(order[: order.index(dotted(module))])
    assert not sorted({source for source, _ in imports(module) if source and source not in earlier})


@pytest.mark.parametrize('module', MODULES, ids=dotted)
def test_no_private_name_is_imported(module):
    assert not [(m, n) for m, n in imports(module, top_level=False) if n.startswith('_') and m != dotted(module)]


def test_nothing_outside_bench_imports_bench():
    users = {dotted(m) for m in MODULES for source, _ in imports(m) if source.startswith('bench')}
    assert not [m for m in users if not m.startswith('bench.')]


@pytest.mark.parametrize('module', MODULES, ids=dotted)
def test_methods_belong_to_the_module_of_their_class(module):
    "Neither `@patch` nor an assignment adds to a class of another module."
    body = tree(module).body
    own = {n.name for n in body if isinstance(n, ast.ClassDef)}
    foreign = []
    for node in body:
        decorators = [ast.unparse(d).split('(')[0] for d in getattr(node, 'decorator_list', [])]
        if isinstance(node, ast.FunctionDef) and 'patch' in decorators:
            target = ast.unparse(node.args.args[0].annotation)
            foreign += [(target, node.name)] * (target not in own)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
            target = ast.unparse(node.targets[0].value)
            foreign += [(target, ast.unparse(node))] * (target not in own)
    assert not foreign


def test_no_two_public_names_are_alike():
    where = defaultdict(list)
    for module in MODULES:
        for name in public_names(module):
            where[name].append(dotted(module))
    assert not {name: found for name, found in where.items() if len(found) > 1}


def test_public_names_are_few_and_exist():
    code = """
import circuit_sae, circuit_sae.all as a
same = all(getattr(circuit_sae, n) is getattr(a, n) for n in a.__all__)
print(len(a.__all__), len(set(a.__all__)), same, any(m.startswith("bench") for m in a._PUBLIC))
"""
    listed, different, same, bench = python(code, ROOT).split()
    assert int(listed) == int(different) <= MAX_PUBLIC
    assert same == 'True' and bench == 'False'


def test_transformer_lens_is_imported_by_models_alone():
    users = [m for m in MODULES if re.search(r'^\s*(from|import) transformer_lens', m.read_text(), re.M)]
    assert {dotted(m).split('.')[0] for m in users} == {'models'}


def test_importing_the_package_is_light():
    loaded = python("import sys, circuit_sae; print(*{n.split('.')[0] for n in sys.modules})", ROOT).split()
    heavy = {'torch', 'transformers', 'transformer_lens', 'matplotlib', 'pandas', 'ipywidgets', 'numpy'}
    assert not heavy & set(loaded)


# Pages and files


def test_readme_is_made_from_the_index():
    made = runpy.run_path(str(ROOT / '.ci/readme.py'))['readme']()
    assert made == (ROOT / 'README.md').read_text(encoding='utf-8'), 'run python .ci/readme.py'


def test_sidebar_shows_every_notebook():
    "The sidebar names each notebook once, and no page that does not exist."

    def pages(x):
        if isinstance(x, str):
            return [x]
        if isinstance(x, list):
            return [p for o in x for p in pages(o)]
        return [x['href']] if 'href' in x else pages(x['contents'])

    site = yaml.safe_load((ROOT / '_quarto.yml').read_text(encoding='utf-8'))['website']
    shown = pages(site['sidebar']['contents'])
    assert len(shown) == len(set(shown))
    assert not [p for p in shown if not (ROOT / 'nbs' / p).exists()]
    assert {p.relative_to(ROOT / 'nbs').as_posix() for p in NOTEBOOKS} <= set(shown)


def test_notebooks_are_small():
    assert not [p.name for p in NOTEBOOKS if p.stat().st_size > 1_500_000]


def text_files():
    "Yield each text file of the repository with its text."
    for p in repo_files():
        try:
            yield p, (ROOT / p).read_text(encoding='utf-8')
        except UnicodeDecodeError:
            pass


def test_no_file_names_a_registry_host():
    parts = [
        *(('pypi', 'org'), ('pythonhosted', 'org'), ('download.pytorch', 'org'), ('npmjs', 'org'), ('npmjs', 'com')),
        *(('conda.anaconda', 'org'), ('deb.debian', 'org'), ('crates', 'io'), ('proxy.golang', 'org')),
    ]
    hosts = [f'{name}.{top}' for name, top in parts]
    assert not [(str(p), h) for p, text in text_files() for h in hosts if h in text]


def test_no_file_names_a_folder_of_the_machine_it_was_made_on():
    pattern = re.compile(r'(?<![\w.~-])/(?:home|root|Users|work)/[\w.-]+')
    assert not [(str(p), m[0]) for p, text in text_files() if (m := pattern.search(text))]
