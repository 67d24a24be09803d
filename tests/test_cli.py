"""The command line as a user has it: in a process of its own, from a folder of the user's own."""

import subprocess
import sys

import pytest
from conftest import ROOT

from circuit_sae.causal.patching import ABLATIONS
from circuit_sae.cli import main
from circuit_sae.codes.activations import POOLS
from circuit_sae.commands import CHOICES
from circuit_sae.find import PRESETS, SCORES
from circuit_sae.models.behaviour import METRICS

HEAVY = {'torch', 'transformers', 'transformer_lens', 'matplotlib', 'pandas', 'scipy'}


def in_a_new_process(code, folder, *arguments):
    "Run code with the package on the path; return its exit status, standard output and standard error."
    environment = {'PYTHONPATH': str(ROOT), 'PATH': ''}
    command = [sys.executable, '-c', code, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout, done.stderr


REFUSED = {
    'no_such_command': 'invalid choice',
    'check none.csv': "there is no file 'none.csv'",
    'find none.csv': "there is no file 'none.csv'",
    'certify none.csv': "there is no file 'none.csv'",
    'find ioi --model /no/such/model': "there is no folder '/no/such/model'",
    'find ioi --preset quik': "Did you mean 'quick'",
    'find ioi --n 1': 'at least 2',
    'patch ioi --metric loss': "unknown metric 'loss'",
    'patch ioi --out effects.csv': 'effects.safetensors',
    'check ioi --dtype float8': "unknown dtype 'float8'",
}


def test_input_is_refused_before_pytorch_is_imported(tmp_path):
    code = """
import sys
from circuit_sae.cli import main
for command in sys.argv[1:]:
    try:
        status = main(command.split())
    except SystemExit as e:
        status = e.code
    print(status, *sorted({'HEAVY'} & set(sys.modules)))
""".replace("{'HEAVY'}", str(HEAVY))
    _, out, errors = in_a_new_process(code, tmp_path, *REFUSED)
    assert out.split('\n')[:-1] == ['2'] * len(REFUSED), out
    for line, expected in zip(errors.splitlines(), REFUSED.values(), strict=True):
        assert expected in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('module', ['circuit_sae', 'circuit_sae.cli'])
def test_python_m(module, tmp_path):
    "`python -m circuit_sae` is the command, with its exit status."
    command = [sys.executable, '-X', 'importtime', '-m', module, 'tasks']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={'PYTHONPATH': str(ROOT)})
    assert done.returncode == 0 and 'ioi' in done.stdout
    assert not HEAVY & {line.split('|')[-1].strip() for line in done.stderr.splitlines()}


def test_the_first_line_comes_before_pytorch_is_imported(tmp_path):
    "Every command is ended by its first line."
    code = """
import sys
from circuit_sae.cli import main

class First:
    def write(self, text):
        sys.stderr.write(text + str('torch' in sys.modules) + chr(10))
        sys.exit(0)
    def flush(self):
        pass

sys.stdout = First()
for command in sys.argv[1:]:
    try:
        main([command, *(['ioi', '--n', '7'] if command != 'paper' else [])])
    except SystemExit:
        pass
"""
    commands = ['check', 'find', 'certify', 'inspect', 'patch']
    _, _, lines = in_a_new_process(code, tmp_path, *commands, 'paper')
    assert lines.splitlines()[:5] == ['ioi: 7 pairs. Loading smollm2-135m ...False'] * 5
    assert lines.splitlines()[5:] == ['Loading what paper needs ...False']


def test_names_of_options_are_those_of_the_functions():
    assert CHOICES['preset'] == list(PRESETS) and CHOICES['score'] == list(SCORES)
    assert CHOICES['pool'] == POOLS and CHOICES['ablation'] == ABLATIONS
    assert CHOICES['metric'] == [*METRICS, 'kl_div']


def test_patch_refuses_a_folder_as_file(tmp_path, capsys):
    (tmp_path / 'runs').mkdir()
    assert main(['patch', 'ioi', '--n', '4', '--out', str(tmp_path / 'runs')]) == 2
    assert 'got the folder' in capsys.readouterr().err
    assert not list((tmp_path / 'runs').iterdir())
