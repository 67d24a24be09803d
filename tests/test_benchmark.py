"A benchmark is killed, damaged, given bad arguments and other executors; its table stays the same."

import multiprocessing
import os
import shutil
import signal
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
from notebook_server import context

from circuit_sae.bench import benchmark as benchmark_module
from circuit_sae.bench.benchmark import benchmark, judge_table, leaderboard, load_table, paired
from circuit_sae.bench.runs import become_worker
from circuit_sae.bench.scorers import SCORERS, scorer
from circuit_sae.core import InputError, refuses
from circuit_sae.truth.planted import plant

SLOW_SCORERS = """
import os
import time

import numpy as np


def note(what, evidence):
    with open(os.environ['BENCH_LOG'], 'a') as f:
        f.write(f'{what} {evidence.task.seed} {evidence.seed}\\n')


def slow(evidence):
    note('start', evidence)
    time.sleep(0.25)
    note('end', evidence)
    return np.random.default_rng(evidence.seed).random(evidence.n)


def fragile(evidence):
    "End the whole process, once."
    flag = os.environ['BENCH_LOG'] + '.died'
    if evidence.seed == 2 and not os.path.exists(flag):
        open(flag, 'w').close()
        os._exit(1)
    return slow(evidence)
"""

METHODS = ['random', 'layer index', ('random, again', 'random')]
WHAT = dict(tasks=['induction', 'chain'], models='planted', seeds=(0, 1), draws=(0, 1), n_pairs=5)
ONE_CELL = dict(tasks='chain', models='planted', n_pairs=5)


@pytest.fixture
def slow_scorers(tmp_path, monkeypatch):
    "Return a module of scorers that other processes can import and that log every call."
    (tmp_path / 'slow_scorers.py').write_text(SLOW_SCORERS)
    monkeypatch.syspath_prepend(tmp_path)
    path = [str(tmp_path), os.environ.get('PYTHONPATH')]
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join(filter(None, path)))
    monkeypatch.setenv('BENCH_LOG', str(tmp_path / 'log'))
    sys.modules.pop('slow_scorers', None)
    import slow_scorers

    yield slow_scorers
    sys.modules.pop('slow_scorers', None)


@pytest.fixture
def here():
    "Return an executor that works in this process."
    with ThreadPoolExecutor(1) as thread:
        yield thread


def log(tmp_path, what):
    "Return (draw, seed) of every logged call of that kind."
    lines = (tmp_path / 'log').read_text().splitlines()
    return [tuple(line.split()[1:]) for line in lines if line.startswith(what)]


def finished(out):
    "Return the names of the files of finished runs."
    if not (out / 'rows').is_dir():
        return []
    return sorted(p.name for p in (out / 'rows').glob('*.json') if p.name[0] != '.')


def same(a, b):
    "Return whether two tables are equal but for when and where they were made."
    volatile = ['started', 'seconds', 'machine']
    return a.drop(columns=volatile).equals(b.drop(columns=volatile))


def wait_for(condition, seconds=180):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'the condition did not become true'
        time.sleep(0.02)


def run_benchmark(environment, path, out, what):
    "Run the slow scorer in another process; the target of a process that is killed."
    os.setsid()
    os.environ.update(environment)
    sys.path[:0] = path
    import slow_scorers

    copies = multiprocessing.get_context('fork')  # a new process would import PyTorch first
    benchmark_module._processes = lambda *_: ProcessPoolExecutor(1, copies, become_worker, (1,))
    benchmark(slow_scorers.slow, n_workers=1, out=out, **what)


def kill_when_four_runs_are_finished(out, what):
    "Run a benchmark, kill the parent process alone, and return the files of the finished runs."
    environment = {name: os.environ[name] for name in ('BENCH_LOG', 'PYTHONPATH')}
    process = context().Process(target=run_benchmark, args=(environment, sys.path, out, what))
    process.start()
    try:
        wait_for(lambda: len(finished(out)) >= 4)
        process.kill()
        process.join()
        time.sleep(1)
        kept = {name: (out / 'rows' / name).read_bytes() for name in finished(out)}
        time.sleep(1)
        assert finished(out) == sorted(kept), 'a worker outlives the process that started it'
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return kept


def test_a_kill_loses_only_the_run_in_progress(tmp_path, slow_scorers, here):
    out = tmp_path / 'out'
    what = dict(tasks='induction', models='planted', seeds=range(6), draws=(0, 1), n_pairs=5)
    kept = kill_when_four_runs_are_finished(out, what)
    assert 4 <= len(kept) < 12
    assert len(load_table(out)) == len(kept)  # the folder can be read as it is
    df = benchmark(slow_scorers.slow, out=out, executor=here, **what)
    assert len(df) == 12
    assert df.roc_auc.notna().all()
    assert load_table(out).equals(df)
    assert all((out / 'rows' / name).read_bytes() == text for name, text in kept.items())
    starts = log(tmp_path, 'start')
    assert len(set(starts)) == 12
    assert len(starts) <= 13  # at most the run in progress is done twice
    benchmark(slow_scorers.slow, out=out, executor=here, **what)
    assert log(tmp_path, 'start') == starts  # a third start does nothing


def start_worker(environment, path):
    "Prepare a worker that was copied from the fork server."
    os.environ.update(environment)
    sys.path[:0] = path
    become_worker(1)


def test_a_worker_that_dies_loses_only_its_own_run(tmp_path, slow_scorers, here, monkeypatch):
    prepared = {name: os.environ[name] for name in ('BENCH_LOG', 'PYTHONPATH')}, sys.path
    pool = ProcessPoolExecutor(1, context(), start_worker, prepared)  # a new process would import PyTorch first
    monkeypatch.setattr(benchmark_module, '_processes', lambda *_: pool)
    what = dict(tasks='induction', models='planted', seeds=range(4), n_pairs=5, out=tmp_path / 'out')
    with refuses('worker-died'):
        benchmark(slow_scorers.fragile, n_workers=1, **what)
    assert len(finished(tmp_path / 'out')) == 2
    assert len(benchmark(slow_scorers.fragile, executor=here, **what)) == 4
    assert sorted(log(tmp_path, 'start')) == [('0', str(s)) for s in range(4)]


def test_the_order_does_not_depend_on_the_executor(tmp_path):
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(4) as four:
        a = benchmark(METHODS, out=tmp_path / 'a', executor=one, **WHAT)
        b = benchmark(METHODS, out=tmp_path / 'b', executor=four, **WHAT)
    assert same(a, b)
    seeds = {'random': (0, 1), 'layer index': (-1,), 'random, again': (0, 1)}
    expected = [
        (task, draw, method, seed)
        for task in WHAT['tasks']
        for draw in WHAT['draws']
        for method in seeds
        for seed in seeds[method]
    ]
    assert list(zip(a.task, a.draw, a.method, a.seed.fillna(-1))) == expected


def test_runs_are_added_and_none_is_lost(tmp_path, here):
    small = benchmark('random', out=tmp_path, executor=here, **WHAT)
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / 'rows').iterdir()}
    large = benchmark(METHODS, out=tmp_path, executor=here, **WHAT)
    assert same(large[large.method == 'random'].reset_index(drop=True), small)
    assert all(p.stat().st_mtime_ns == t for p, t in stamps.items())
    benchmark('random', out=tmp_path, executor=here, **WHAT)
    assert sorted(load_table(tmp_path).key) == sorted(large.key)  # the table still holds all runs


def test_the_table_alone_is_enough_to_continue(tmp_path, here):
    df = benchmark(METHODS, out=tmp_path, executor=here, **WHAT)
    shutil.rmtree(tmp_path / 'rows')  # as in a folder that was committed
    again = benchmark(METHODS, out=tmp_path, executor=here, **WHAT)
    assert again.equals(df)
    assert not finished(tmp_path)  # no run was repeated
    (tmp_path / 'table.parquet').write_bytes(b'PAR1')
    with refuses('unreadable-file'):
        load_table(tmp_path)
    assert (tmp_path / 'table.parquet').read_bytes() == b'PAR1'  # reading changes nothing


def test_damaged_files_are_renamed(tmp_path, here):
    df = benchmark(METHODS, out=tmp_path, executor=here, **WHAT)
    rows = sorted((tmp_path / 'rows').iterdir())
    other_draw = rows[2].read_bytes().replace(b'"draw": 0', b'"draw": 7').replace(b'"draw": 1', b'"draw": 7')
    damage = {
        rows[0]: b'',
        rows[1]: b'{"row": {"key"',
        rows[2]: other_draw,
        rows[3]: rows[4].read_bytes(),
        rows[5]: b'\xff\xfe',
        tmp_path / 'table.parquet': b'PAR1',
    }
    for p, text in damage.items():
        p.write_bytes(text)
    with pytest.warns(UserWarning, match='corrupt') as said:
        again = benchmark(METHODS, out=tmp_path, executor=here, **WHAT)
    assert same(again, df)
    assert len(said) == len(damage)
    for p, text in damage.items():
        assert p.with_name(p.name + '.corrupt').read_bytes() == text
        assert any(str(p) in str(w.message) for w in said)
        assert p.exists()  # computed again
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert same(benchmark(METHODS, out=tmp_path, executor=here, **WHAT), df)


def test_planted_runs_are_judged_by_the_planted_circuit(tmp_path, here):
    def oracle(evidence):
        return plant('chain', seed=evidence.task.seed, n=5).truth.mask()

    oracle.seeded = False
    df = benchmark([oracle, 'random'], out=tmp_path, executor=here, **WHAT | dict(tasks='chain'))
    own = df[df.method == 'oracle']
    assert (own.roc_auc == 1).all()
    assert (own.average_precision == 1).all()
    assert df.n_true.tolist() == [len(plant('chain', seed=d, n=5).truth) for d in df.draw]
    assert (judge_table(df, {'chain': ['0.0']}).n_true == 1).all()
    assert paired(df, 'oracle', 'random').wins == 2
    assert leaderboard(df).frame.method.tolist() == ['oracle', 'random']


def test_a_failing_run_does_not_stop_the_others(tmp_path, here):
    def half(evidence):
        if evidence.seed:
            raise KeyError('no such thing')
        return np.arange(evidence.n)

    with pytest.warns(UserWarning, match='4 of 20 runs failed'):
        df = benchmark([half, 'random', 'layer index'], out=tmp_path, executor=here, **WHAT)
    assert df[df.error.notna()].method.tolist() == ['half'] * 4
    assert df.error.dropna().str.contains('no such thing').all()
    assert len(finished(tmp_path)) == 16
    assert len(load_table(tmp_path)) == 20
    assert 'runs failed' in repr(leaderboard(df))


@pytest.mark.parametrize(
    'methods, more, code',
    [
        ('mean diference', {}, 'unknown-name'),
        ('random', dict(tasks='chians'), 'unknown-name'),
        ('random', dict(models='plantd'), 'unknown-name'),
        ('random', dict(tasks='chain[noize=1]'), 'unknown-name'),
        ('random', dict(reference={'chian': ['0.0']}), 'unknown-name'),
        ([], {}, 'empty-list'),
        ('random', dict(models='gpt2', tasks='ioi', n_pairs=1), 'not-a-count'),
        (['random', 'random'], {}, 'same-name'),
        (lambda evidence: evidence, {}, 'not-importable'),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(tmp_path, methods, more, code):
    with refuses(code):
        benchmark(methods, **ONE_CELL | dict(out=tmp_path / 'out') | more)
    assert not (tmp_path / 'out').exists()


def test_a_scorer_that_only_this_process_has_registered_needs_an_executor(tmp_path, here):
    @scorer('mine')
    def mine(evidence):
        return np.arange(evidence.n)

    try:
        with refuses('not-importable'):
            benchmark('mine', out=tmp_path, **ONE_CELL)
        assert benchmark('mine', out=tmp_path, executor=here, **ONE_CELL).error.isna().all()
    finally:
        del SCORERS['mine']


def test_a_truth_of_another_model_is_refused(tmp_path, here):
    what = ONE_CELL | dict(out=tmp_path, executor=here)
    with refuses('other-model'):
        benchmark('random', reference={'chain': ['L11H10']}, **what)
    assert len(finished(tmp_path)) == 1  # the run is kept, and can be judged by another truth
    assert len(benchmark('random', **what)) == 1


def save_gpt2(folder):
    "Save a random GPT-2 with 2 x 4 heads."
    from transformers import GPT2Config, GPT2LMHeadModel

    from circuit_sae.data.prompts import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    config = GPT2Config(n_layer=2, n_head=4, n_embd=32, vocab_size=len(tokenizer))
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_a_model_in_a_folder_and_a_task_in_a_file(tmp_path, here):
    from circuit_sae.data.prompts import ioi_task

    folder, pairs = tmp_path / 'model', tmp_path / 'mine.jsonl'
    save_gpt2(folder)
    ioi_task(n=8).save(pairs)
    what = dict(models=str(folder), tasks=['ioi', str(pairs)], draws=(0, 1), n_pairs=6)
    what |= dict(out=tmp_path / 'out', executor=here)
    with refuses('no-truth'):
        benchmark('mean difference', **what)
    with refuses('other-model'):
        benchmark('mean difference', reference={'ioi': ['L2H0'], 'mine': None}, **what)
    truths = {'ioi': ['L1H0'], 'mine': None}
    df = benchmark('mean difference', reference=truths, **what)
    assert df.error.isna().all()
    assert df.n_pairs.eq(6).all()
    assert [len(s) for s in df.scores] == [8] * 4
    assert df.roc_auc.notna().tolist() == [True, True, False, False]
    assert df.forward.ge(12).all()
    assert df.scores[0] != df.scores[1]  # each draw has its own prompts
    assert df.scores[2] != df.scores[3]
    ioi_task(n=9).save(pairs)  # the file changes: its runs are new, the others are not
    again = benchmark('mean difference', reference=truths, **what)
    assert (again.key == df.key).tolist() == [True, True, False, False]


def test_an_input_error_keeps_its_code_when_a_table_is_judged(tmp_path, here):
    df = benchmark('layer index', out=tmp_path, executor=here, **ONE_CELL)
    with pytest.raises(InputError, match='planted, chain: ') as error:
        judge_table(df, {'chain': ['L11H10']})
    assert error.value.code == 'other-model'
