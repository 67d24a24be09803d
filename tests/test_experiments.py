"Test the paper's table without a connection to the hub, and that experiments share runs."

from concurrent.futures import ThreadPoolExecutor

import pytest
from huggingface_hub import constants

from circuit_sae.bench import benchmark as benchmark_module
from circuit_sae.bench.benchmark import load_table
from circuit_sae.bench.experiments import EXPERIMENTS, experiment_table, run_experiment, verdict
from circuit_sae.cli import main


def test_without_the_hub_the_paper_ends_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:9')
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    monkeypatch.setattr(benchmark_module, '_processes', lambda *_: ThreadPoolExecutor(1))  # no new processes
    arguments = ['--models', 'gpt2', '--seeds', '1', '--n', '5', '--out', str(tmp_path / 'paper')]
    status = main(['paper', *arguments])
    said = capsys.readouterr().err
    messages = [line for line in said.splitlines() if line.startswith('circuit_sae:')]
    assert status == 2 and len(messages) == 1 and 'Traceback' not in said, said
    assert 'gpt2' in messages[0]


def test_experiments_share_their_runs(tmp_path):
    with ThreadPoolExecutor(1) as here:
        arguments = dict(model='planted', tasks='chain', draws=range(2), n_pairs=12, out=tmp_path, executor=here)
        first = run_experiment('softmax', **arguments)
        second = run_experiment('pooling', **arguments)
    shared = set(first.key) & set(second.key)
    assert {*first[first.key.isin(shared)].method} == {'paper'} and len(shared) == 2
    table = load_table(tmp_path)
    assert len(table) == len(first) + len(second) - 2
    for name, df in (('softmax', first), ('pooling', second)):  # runs of the other experiment do not matter
        assert experiment_table(table, name).equals(experiment_table(df, name))
        assert repr(verdict(table, name)) == repr(verdict(df, name))


@pytest.mark.parametrize('name', EXPERIMENTS)
def test_every_experiment_names_its_change(name):
    e = EXPERIMENTS[name]
    assert e.question.endswith('?') and e.says and e.claim in ('choice', 'trend', 'spread')
    assert e.methods[0] == ('paper', 'unique codes', dict(preset='paper'))
    assert (e.claim == 'trend') == (e.figures is not None)
    assert (e.claim == 'spread') == (e.range is not None)
