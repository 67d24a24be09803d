"""Test what is timed: the plain forms equal the package, tables survive a file, and a stage that fails has a row.

No ratio is asserted, because machines differ."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from circuit_sae.bench import speed as speed_module
from circuit_sae.bench.counting import CountingDevice
from circuit_sae.bench.speed import SPEED_STAGES, on_paper, speed
from circuit_sae.bench.timing import (
    Row,
    fresh_python,
    literal_node_scores,
    literal_pair_counts,
    literal_train,
    load_speed,
    peak_memory,
    race,
)
from circuit_sae.causal.confirm import confirm_heads
from circuit_sae.codes.activations import cache_head_acts
from circuit_sae.codes.health import sae_health
from circuit_sae.codes.latents import attribute_codes
from circuit_sae.codes.train import train_sae
from circuit_sae.core import InputError
from circuit_sae.data.batches import bind_task
from circuit_sae.data.prompts import ioi_task, tiny_tokenizer
from circuit_sae.models.load import save_random_model, tiny_model
from circuit_sae.models.rerun import _find_shortcuts, reruns
from circuit_sae.models.support import check_model
from circuit_sae.score.attribution import attribute_heads
from circuit_sae.score.flow import difference_flow
from circuit_sae.score.unique_codes import node_scores, pair_counts
from circuit_sae.truth.planted import plant

STAGES = ['node scores', 'edge scores', 'SAE training', 'edges, 1,024 heads', 'find']


@pytest.fixture(scope='module')
def tiny():
    return tiny_model()


@pytest.fixture(scope='module')
def deep(tmp_path_factory):
    "Return a narrow model of six layers, in which several heads share a key and a value."
    shape = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4)
    config = LlamaConfig(vocab_size=len(tiny_tokenizer()), num_key_value_heads=2, **shape)
    return save_random_model(config, tmp_path_factory.mktemp('deep'), device='cpu')


@pytest.fixture(scope='module')
def table(tiny):
    return speed(tiny, 'ioi', 8, STAGES)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 20), st.integers(1, 8), st.integers(1, 12))
def test_literal_scores_equal_the_library(seed, n, heads, codes):
    rng = np.random.default_rng(seed)
    c = rng.integers(-1, codes, (n, heads))
    y = np.arange(n) < max(1, n // 2)
    np.testing.assert_array_equal(literal_node_scores(c, y), node_scores(c, y))
    np.testing.assert_array_equal(literal_pair_counts(c, y, codes), pair_counts(c, y))


PUBLISHED = dict(unit_norm='last_axis', null_code=0, draw='random')


@pytest.mark.parametrize('changes', [PUBLISHED, dict(head_norm='rms')], ids=['published', 'rms'])
def test_literal_training_equals_the_library(tiny, changes):
    acts = cache_head_acts(tiny, ioi_task(n=8))
    plain = literal_train(acts, n_epochs=40, **changes)
    ours = train_sae(acts, n_epochs=40, lr=1e-3, init='random', **changes)
    np.testing.assert_allclose(plain.losses, ours.losses, rtol=1e-4)


def test_every_row_says_what_was_measured(table):
    assert [r.stage for r in table] == STAGES
    for r in list(table)[:4]:
        assert min(r.walls) > 0 and r.met in (True, False), r
    assert [len(r.walls) for r in table] == [2, 2, 2, 1, 0]
    assert table.machine['threads'] >= 1 and table.machine['processor'] and table.settings['model'] == 'tiny'


def test_a_row_without_a_measurement_says_why(table):
    assert table['find'].met is None and 'needs a model by name' in table['find'].note
    assert 'needs a model by name' in repr(table) and '| find | not measured |' in table._repr_markdown_()


def test_a_stage_that_fails_is_a_row(tiny, monkeypatch, tmp_path):
    def broken(c):
        raise ZeroDivisionError('by\nzero')

    monkeypatch.setitem(SPEED_STAGES, 'node scores', broken)
    t = speed(tiny, 'ioi', 4, ['node scores'], out=tmp_path / 't.json')
    assert t['node scores'].note == 'ZeroDivisionError: by zero'
    assert repr(load_speed(tmp_path / 't.json')) == repr(t)


def test_another_result_is_not_measured(tiny, monkeypatch):
    monkeypatch.setattr(speed_module, 'node_scores', lambda c, y: np.zeros(c.shape[1], int) - 1)
    assert 'another result' in speed(tiny, 'ioi', 8, ['node scores'])['node scores'].note


def test_table_survives_a_file(table, tmp_path):
    table.save(tmp_path / 't.json')
    again = load_speed(tmp_path / 't.json')
    assert repr(again) == repr(table) and [r.met for r in again] == [r.met for r in table]
    (tmp_path / 'no.json').write_text('{}')
    with pytest.raises(InputError):
        load_speed(tmp_path / 'no.json')


def test_targets_of_a_row():
    def met(*bounds):
        return Row('x', 'y', [1.0], list(bounds)).met

    assert met((1.1, '≤', 1.1, '×'))
    assert not met((1.0, '<', 1.0, ' s'))
    assert not met((3.0, '≥', 2, ''), (None, '≥', 2, ''))
    assert met() is None


def test_unknown_stages_and_tasks_are_refused(tiny):
    with pytest.raises(InputError, match="Did you mean 'node scores'") as error:
        speed(tiny, stages=['node score'])
    assert error.value.code == 'unknown-name'
    with pytest.raises(InputError, match="Did you mean 'ioi'"):
        speed(tiny, 'io')


def test_clock_memory_and_fresh_processes():
    (a, b), results = race(lambda: 1, lambda: 2)
    assert results == [1, 2] and a >= 0

    def use_memory():
        kept = np.ones(50_000_000)
        kept.sum()
        race(lambda: None, repeats=10**4)

    assert peak_memory(use_memory)[1] > 80
    assert fresh_python('import os; print(os.environ["OMP_NUM_THREADS"].isdigit())') == 'True\n'
    with pytest.raises(RuntimeError, match='ValueError: no'):
        fresh_python('raise ValueError("no")')


def test_on_paper_names_what_does_not_fit():
    small = on_paper(30, 9, 64, 576, 106e6)
    big = on_paper(80, 64, 128, 8192, 69e9)
    assert small['does not fit'] == 'nothing' and big['does not fit'].startswith('weights')


def test_the_command_line_has_it():
    code = "from circuit_sae.cli import main; main(['--help'])"
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert run.returncode == 0 and 'speed' in run.stdout


@pytest.mark.parametrize('stage', ['activations', 'training', 'flow', 'find'])
def test_counts_meet_their_targets(deep, stage):
    "Operators and copies to the host are the same on every machine; they predict the time on a GPU."
    (row,) = speed(deep, 'ioi', 8, [f'work: {stage}'])
    assert row.met, row


def test_copies_do_not_grow_with_layers_and_pairs(tiny, deep):
    "Each stage copies its results to the host a fixed number of times."
    copies = {}
    for model, n in ((tiny, 4), (deep, 8)):
        bound = bind_task(model, ioi_task(n=n))
        bound.identity
        check_model(bound, 'activations')  # what is done once for a model
        with CountingDevice(model) as device:
            copies['acts', n], acts = device.count(lambda: cache_head_acts(bound, batch_size=3))
            copies['sae', n], sae = device.count(lambda: train_sae(acts, n_examples=4, n_epochs=n, d_sae=20))
            copies['codes', n], _ = device.count(lambda: sae.codes(acts))
            copies['health', n], _ = device.count(lambda: sae_health(sae, acts))
            attribute_codes(bound, sae=sae, n=1)
            copies['latents', n], _ = device.count(lambda: attribute_codes(bound, sae=sae, batch_size=3))
            difference_flow(bound, n=1)
            copies['flow', n], _ = device.count(lambda: difference_flow(bound, edges='all', batch_size=3))
            copies['attribution', n], _ = device.count(lambda: attribute_heads(bound, batch_size=3))
    for stage in {stage for stage, _ in copies}:
        assert copies[stage, 4].to_host == copies[stage, 8].to_host <= 8, (stage, copies[stage, 4], copies[stage, 8])


def test_results_are_those_of_the_cpu(deep):
    bound = bind_task(deep, ioi_task(n=6))
    acts = cache_head_acts(bound)
    flow = difference_flow(bound, edges=True)
    effects = attribute_heads(bound)
    sae = train_sae(acts, n_epochs=20, d_sae=30)
    with CountingDevice(deep):
        acts2 = cache_head_acts(bound)
        flow2 = difference_flow(bound, edges=True)
        effects2 = attribute_heads(bound)
        sae2 = train_sae(acts2, n_epochs=20, d_sae=30).to('cpu')
        z = acts2.z.cpu()
    np.testing.assert_allclose(z, acts.z, atol=1e-6)
    np.testing.assert_allclose(acts2.behaviour.judged, acts.behaviour.judged, atol=1e-4)
    np.testing.assert_allclose(flow2.by_pair, flow.by_pair, atol=1e-5)
    np.testing.assert_allclose(flow2.between, flow.between, atol=1e-5)
    np.testing.assert_allclose(effects2.by_pair, effects.by_pair, atol=1e-6)
    np.testing.assert_allclose(sae2.losses, sae.losses, rtol=1e-4)


def test_a_rerun_takes_the_same_shortcuts_on_another_device(deep):
    "The shortcuts are tried with padded prompts; an index on the wrong device would look like an unsuited model."
    assert reruns(deep) == (True, True, True)
    with CountingDevice(deep):
        assert _find_shortcuts(deep) == (True, True, True)


def test_confirmation_is_that_of_the_cpu():
    "On another device than the CPU the clean passes of all blocks are run at once; the effects are the same."
    planted = plant('induction', seed=17, n=30)
    bound = bind_task(planted.model, planted.task)
    screen = attribute_heads(bound.take(6))
    pairs = np.arange(6, 30)
    wanted = confirm_heads(bound, None, screen, pairs)
    with CountingDevice(planted.model):
        found = confirm_heads(bound, None, screen, pairs)
    assert found.circuit_heads() == wanted.circuit_heads() and found.n_used == wanted.n_used
    np.testing.assert_allclose(found.effects.patched, wanted.effects.patched, atol=1e-4)
    np.testing.assert_allclose(found.last, wanted.last, atol=1e-4)
