"What a notebook cannot show: the paper's table where the hub cannot be reached, and that a run of an experiment counts for the next."
import os, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
import pytest
from circuit_sae.bench.benchmark import load_table
from circuit_sae.bench.experiments import EXPERIMENTS, experiment_table, run_experiment, verdict

def test_without_the_hub_the_paper_ends_in_one_line(tmp_path):
    env = {**os.environ, 'HF_ENDPOINT': 'http://127.0.0.1:9', 'HF_HOME': str(tmp_path/'hub')}
    code = "import sys; from circuit_sae.cli import main; sys.exit(main(['paper', '--models', 'gpt2', '--seeds', '1', '--n', '5', '--workers', '1']))"
    r = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300)
    said = [l for l in r.stderr.splitlines() if l.startswith('circuit_sae:')]
    assert r.returncode == 2 and len(said) == 1 and 'Traceback' not in r.stderr, r.stderr
    assert "cannot load the model from the hub 'gpt2'" in said[0]

def test_experiments_share_their_runs(tmp_path):
    with ThreadPoolExecutor(1) as here:
        what = dict(model='planted', tasks='chain', draws=range(2), n_pairs=12, out=tmp_path, executor=here)
        first = run_experiment('softmax', **what)
        second = run_experiment('pooling', **what)
    shared = set(first.key) & set(second.key)
    assert {*first[first.key.isin(shared)].method} == {'paper'} and len(shared) == 2
    table = load_table(tmp_path)
    assert len(table) == len(first) + len(second) - 2
    for name, df in (('softmax', first), ('pooling', second)):
        assert experiment_table(table, name).equals(experiment_table(df, name))   # the others do not disturb it
        assert repr(verdict(table, name)) == repr(verdict(df, name))

@pytest.mark.parametrize('name', EXPERIMENTS)
def test_every_experiment_names_what_it_changes(name):
    e = EXPERIMENTS[name]
    assert e.question.endswith('?') and e.says and e.claim in ('choice', 'trend', 'spread')
    assert e.methods[0] == ('paper', 'unique codes', dict(preset='paper'))
    assert (e.claim == 'trend') == (e.figures is not None) and (e.claim == 'spread') == (e.range is not None)
