"The source archive makes a wheel by itself, and the wheel holds what a user needs."

import configparser
import gzip
import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string

import pytest
from conftest import ROOT


@pytest.fixture
def settings():
    p = configparser.ConfigParser(delimiters=['='])
    p.read(ROOT / 'settings.ini', encoding='utf-8')
    return p['DEFAULT']


def build(kind, source, out):
    "Build one archive of `source` and return its path."
    r = subprocess.run(
        [sys.executable, '-m', 'build', f'--{kind}', '--no-isolation', '--outdir', str(out), str(source)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert r.returncode == 0, r.stdout[-2000:] + r.stderr[-2000:]
    return next(out.glob('*.tar.gz' if kind == 'sdist' else '*.whl'))


def norm(requirement):
    from packaging.requirements import Requirement

    r = Requirement(requirement)
    return r.name.lower().replace('_', '-'), frozenset(map(str, r.specifier))


def test_wheel_from_source_archive(copy, tmp_path, settings):
    sdist = build('sdist', copy, tmp_path / 'dist')
    with tarfile.open(sdist) as t:
        t.extractall(tmp_path / 'unpacked', filter='data')
    source = next((tmp_path / 'unpacked').iterdir())
    assert {'settings.ini', 'README.md', 'LICENSE', 'CHANGELOG.md', 'CONTRIBUTING.md', 'constraints.txt'} <= {
        p.name for p in source.iterdir()
    }

    with zipfile.ZipFile(build('wheel', source, tmp_path / 'dist')) as z:
        names = set(z.namelist())
        info = f'{settings["lib_name"]}-{settings["version"]}.dist-info'
        meta = message_from_string(z.read(f'{info}/METADATA').decode())
        points = configparser.ConfigParser(delimiters=['='])
        points.read_string(z.read(f'{info}/entry_points.txt').decode())
    assert {
        p.relative_to(ROOT).as_posix()
        for p in [*(ROOT / 'circuit_sae').rglob('*.py'), *(ROOT / 'circuit_sae/assets').rglob('*.*')]
    } <= names
    assert {
        'circuit_sae/assets/circuits.json',
        *(f'circuit_sae/assets/viewer.{end}' for end in ('html', 'css', 'js')),
    } <= names
    assert not [n for n in names if not n.startswith(('circuit_sae/', info))]
    assert points['console_scripts']['circuit_sae'] == 'circuit_sae.cli:main'
    assert (
        meta['Version'] == settings['version']
        and meta['License'] == 'Apache-2.0'
        and meta['Requires-Python'] == f'>={settings["min_python"]}'
    )
    needs = meta.get_all('Requires-Dist')
    assert {norm(r) for r in needs if 'extra ==' not in r} == {norm(r) for r in settings['requirements'].split()}
    for extra in 'dev', 'bench':
        of_extra = {norm(r.split(';')[0]) for r in needs if re.search(rf'extra == .{extra}.', r)}
        assert of_extra == {norm(r) for r in settings[f'{extra}_requirements'].split()}


@pytest.mark.parametrize('name', ['smollm2', 'planted'])
def test_figures_of_the_tutorials_are_those_of_the_benchmarks(name):
    "An installed tutorial reads a table without scores; it holds what the table beside the benchmark's page holds."
    from circuit_sae.bench.benchmark import load_table

    with gzip.open(ROOT / f'circuit_sae/assets/tutorials/{name}.csv.gz', 'rt') as f:
        shipped = f.read()
    columns = shipped.splitlines()[0].split(',')
    assert shipped == load_table(ROOT / 'nbs/benchmarks' / name)[columns].to_csv(index=False)
