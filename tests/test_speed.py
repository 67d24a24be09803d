"What is timed against what: the plain forms equal the library, the table survives a file, a stage that fails is a row. No ratio is asserted: machines differ."
import subprocess, sys
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from circuit_sae import speed as room
from circuit_sae.codes.activations import cache_head_acts
from circuit_sae.core import InputError
from circuit_sae.models.load import tiny_model
from circuit_sae.data.prompts import ioi_task
from circuit_sae.codes.sae import train_sae
from circuit_sae.score.unique_codes import node_scores, pair_counts
from circuit_sae.bench.speed import SPEED_STAGES, on_paper, speed
from circuit_sae.bench.timing import Row, SpeedTable, fresh_python, literal_node_scores, literal_pair_counts, literal_train, load_speed, peak_memory, race

@pytest.fixture(scope='module')
def tiny(): return tiny_model()

@pytest.fixture(scope='module')
def table(tiny): return speed(tiny, 'ioi', 8, ['node scores', 'edge scores', 'SAE training', 'find'])

@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 20), st.integers(1, 8), st.integers(1, 12))
def test_literal_scores_equal_the_library(seed, n, heads, codes):
    rng = np.random.default_rng(seed)
    c, y = rng.integers(-1, codes, (n, heads)), np.arange(n) < max(1, n//2)
    np.testing.assert_array_equal(literal_node_scores(c, y), node_scores(c, y))
    np.testing.assert_array_equal(literal_pair_counts(c, y, codes), pair_counts(c, y))

@pytest.mark.parametrize('changes', [dict(unit_norm='last_axis', null_code=0, draw='random'), dict(head_norm='rms')], ids=['published', 'rms'])
def test_literal_training_equals_the_library(tiny, changes):
    acts = cache_head_acts(tiny, ioi_task(n=8))
    plain, ours = literal_train(acts, n_epochs=40, **changes), train_sae(acts, n_epochs=40, lr=1e-3, init='random', **changes)
    np.testing.assert_allclose(plain.losses, ours.losses, rtol=1e-4)

def test_every_row_says_what_was_measured(table):
    assert [r.stage for r in table] == ['node scores', 'edge scores', 'SAE training', 'find']
    for r in list(table)[:3]:
        assert len(r.walls) == 2 and min(r.walls) > 0 and r.met in (True, False), r
    assert table.machine['threads'] >= 1 and table.machine['processor'] and table.settings['model'] == 'tiny'

def test_what_cannot_be_measured_says_why(table):
    assert table['find'].met is None and 'needs a model by name' in table['find'].note
    assert 'needs a model by name' in repr(table) and '| find | not measured |' in table._repr_markdown_()

def test_a_stage_that_fails_is_a_row(tiny, monkeypatch, tmp_path):
    def broken(c): raise ZeroDivisionError('by\nzero')
    monkeypatch.setitem(SPEED_STAGES, 'node scores', broken)
    t = speed(tiny, 'ioi', 4, ['node scores'], out=tmp_path/'t.json')
    assert t['node scores'].note == 'ZeroDivisionError: by zero' and repr(load_speed(tmp_path/'t.json')) == repr(t)

def test_a_wrong_result_is_no_speed(tiny, monkeypatch):
    monkeypatch.setattr(room, 'node_scores', lambda c, y: np.zeros(c.shape[1], int) - 1)
    assert 'another result' in speed(tiny, 'ioi', 8, ['node scores'])['node scores'].note

def test_table_survives_a_file(table, tmp_path):
    table.save(tmp_path/'t.json')
    again = load_speed(tmp_path/'t.json')
    assert repr(again) == repr(table) and [r.met for r in again] == [r.met for r in table]
    (tmp_path/'no.json').write_text('{}')
    with pytest.raises(InputError, match='holds no table'): load_speed(tmp_path/'no.json')

def test_bounds_of_a_row():
    row = lambda *bounds: Row('x', 'y', [1.], list(bounds)).met
    assert row((1.1, '≤', 1.1, '×')) and not row((1., '<', 1., ' s')) and not row((3., '≥', 2, ''), (None, '≥', 2, '')) and row() is None

def test_unknown_stages_and_tasks_are_refused(tiny):
    with pytest.raises(InputError, match="Did you mean 'node scores'"): speed(tiny, stages=['node score'])
    with pytest.raises(InputError, match="Did you mean 'ioi'"): speed(tiny, 'io')

def test_the_clock_the_watch_and_fresh_processes():
    (a, b), got = race(lambda: 1, lambda: 2)
    assert got == [1, 2] and a >= 0
    def take(): kept = np.ones(12_500_000); kept.sum(); race(lambda: None, repeats=10**4)
    assert peak_memory(take)[1] > 80
    assert fresh_python('import os; print(os.environ["OMP_NUM_THREADS"].isdigit())') == 'True\n'
    with pytest.raises(RuntimeError, match='ValueError: no'): fresh_python('raise ValueError("no")')

def test_paper_names_what_does_not_fit():
    small, big = on_paper(30, 9, 64, 576, 106e6), on_paper(80, 64, 128, 8192, 69e9)
    assert small['does not fit'] == 'nothing' and big['does not fit'].startswith('weights')

def test_the_command_has_it():
    r = subprocess.run([sys.executable, '-c', "from circuit_sae.cli import main; main(['--help'])"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert r.returncode == 0 and 'speed' in r.stdout
