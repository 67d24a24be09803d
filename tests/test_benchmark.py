"A benchmark is killed, damaged, asked for nonsense and handed to other executors; its table comes out the same."
import os, shutil, signal, subprocess, sys, time, warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
import numpy as np, pytest
from circuit_sae.core import InputError
from circuit_sae.bench.benchmark import benchmark, judge_table, leaderboard, load_table, paired
from circuit_sae.truth.planted import plant

SCORERS = '''
import os, time, numpy as np
def note(what, evidence):
    with open(os.environ['BENCH_LOG'], 'a') as f: f.write(f'{what} {evidence.task.seed} {evidence.seed}\\n')
def slow(evidence):
    note('start', evidence); time.sleep(.25); note('end', evidence)
    return np.random.default_rng(evidence.seed).random(evidence.n)
def fragile(evidence):
    "Takes its process with it, once."
    flag = os.environ['BENCH_LOG'] + '.died'
    if evidence.seed == 2 and not os.path.exists(flag): open(flag, 'w').close(); os._exit(1)
    return slow(evidence)
'''

@pytest.fixture
def slow_scorers(tmp_path, monkeypatch):
    "A module of scorers that other processes can import and that log what they do."
    (tmp_path/'slow_scorers.py').write_text(SCORERS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join(filter(None, [str(tmp_path), os.environ.get('PYTHONPATH')])))
    monkeypatch.setenv('BENCH_LOG', str(tmp_path/'log'))
    sys.modules.pop('slow_scorers', None)
    import slow_scorers
    yield slow_scorers
    sys.modules.pop('slow_scorers', None)

@pytest.fixture
def here():
    with ThreadPoolExecutor(1) as threads: yield threads

def log(tmp_path, what): return [tuple(l.split()[1:]) for l in (tmp_path/'log').read_text().splitlines() if l.startswith(what)]
def finished(out): return sorted(p.name for p in (out/'rows').glob('*.json') if p.name[0] != '.') if (out/'rows').is_dir() else []
def same(a, b): return a.drop(columns=['started', 'seconds', 'machine']).equals(b.drop(columns=['started', 'seconds', 'machine']))

def wait_for(what, seconds=60):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(.02)

def test_a_kill_loses_the_run_in_progress_and_no_other(tmp_path, slow_scorers, here):
    out, what = tmp_path/'out', dict(tasks='induction', models='planted', seeds=range(6), draws=(0, 1), n_pairs=5)
    script = tmp_path/'script.py'
    script.write_text(f'import slow_scorers\nfrom circuit_sae.bench.benchmark import benchmark\n'
                      f'if __name__ == "__main__": benchmark(slow_scorers.slow, n_workers=1, out={str(out)!r}, **{what!r})')
    p = subprocess.Popen([sys.executable, script], start_new_session=True)
    try:
        wait_for(lambda: len(finished(out)) >= 4)
        os.kill(p.pid, signal.SIGKILL)                                     # the parent alone: its worker has to notice
        p.wait()
        time.sleep(1)
        kept = {name: (out/'rows'/name).read_bytes() for name in finished(out)}
        time.sleep(1)
        assert finished(out) == sorted(kept), 'a worker outlives the process that started it'
    finally:
        with suppress(ProcessLookupError): os.killpg(p.pid, signal.SIGKILL)
    assert 4 <= len(kept) < 12
    assert len(load_table(out)) == len(kept)                               # can be read as it is
    df = benchmark(slow_scorers.slow, out=out, executor=here, **what)
    assert len(df) == 12 and df.roc_auc.notna().all() and load_table(out).equals(df)
    assert all((out/'rows'/name).read_bytes() == text for name, text in kept.items())
    starts = log(tmp_path, 'start')
    assert len(set(starts)) == 12 and len(starts) <= 13                    # at most the run in progress is done twice
    benchmark(slow_scorers.slow, out=out, executor=here, **what)
    assert log(tmp_path, 'start') == starts                                # a third start does nothing

def test_a_worker_that_dies_takes_its_own_run_only(tmp_path, slow_scorers, here):
    what = dict(tasks='induction', models='planted', seeds=range(4), n_pairs=5, out=tmp_path/'out')
    with pytest.raises(InputError, match='a worker process died'): benchmark(slow_scorers.fragile, n_workers=1, **what)
    assert len(finished(tmp_path/'out')) == 2
    assert len(benchmark(slow_scorers.fragile, executor=here, **what)) == 4
    assert sorted(log(tmp_path, 'start')) == [('0', str(s)) for s in range(4)]

METHODS = ['random', 'layer index', ('random, again', 'random')]
WHAT = dict(tasks=['induction', 'chain'], models='planted', seeds=(0, 1), draws=(0, 1), n_pairs=5)

def test_order_does_not_depend_on_who_works(tmp_path):
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(4) as four:
        a, b = benchmark(METHODS, out=tmp_path/'a', executor=one, **WHAT), benchmark(METHODS, out=tmp_path/'b', executor=four, **WHAT)
    assert same(a, b)
    assert list(zip(a.task, a.draw, a.method, a.seed.fillna(-1))) == [
        (t, d, m, s) for t in ('induction', 'chain') for d in (0, 1) for m, seeds in (('random', (0, 1)), ('layer index', (-1,)), ('random, again', (0, 1))) for s in seeds]

def test_more_is_added_and_nothing_lost(tmp_path, here):
    small = benchmark('random', out=tmp_path, executor=here, **WHAT)
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path/'rows').iterdir()}
    large = benchmark(METHODS, out=tmp_path, executor=here, **WHAT)
    assert same(large[large.method == 'random'].reset_index(drop=True), small)
    assert all(p.stat().st_mtime_ns == t for p, t in stamps.items())
    benchmark('random', out=tmp_path, executor=here, **WHAT)               # asked for less: the table still holds all
    assert sorted(load_table(tmp_path).key) == sorted(large.key)

def test_a_table_alone_is_enough_to_go_on(tmp_path, here):
    df = benchmark(METHODS, out=tmp_path, executor=here, **WHAT)
    shutil.rmtree(tmp_path/'rows')                                         # as in a folder that was shared or committed
    again = benchmark(METHODS, out=tmp_path, executor=here, **WHAT)
    assert again.equals(df) and not finished(tmp_path)                     # the very same runs, none made again
    (tmp_path/'table.parquet').write_bytes(b'PAR1')
    with pytest.raises(InputError, match='Restore it'): load_table(tmp_path)
    assert (tmp_path/'table.parquet').read_bytes() == b'PAR1'              # reading changes nothing

def test_damaged_files_are_set_aside(tmp_path, here):
    df = benchmark(METHODS, out=tmp_path, executor=here, **WHAT)
    rows = sorted((tmp_path/'rows').iterdir())
    damage = {rows[0]: b'', rows[1]: b'{"row": {"key"', rows[2]: rows[2].read_bytes().replace(b'"draw": 0', b'"draw": 7').replace(b'"draw": 1', b'"draw": 7'),
              rows[3]: rows[4].read_bytes(), rows[5]: b'\xff\xfe', tmp_path/'table.parquet': b'PAR1'}
    for p, text in damage.items(): p.write_bytes(text)
    with pytest.warns(UserWarning, match='corrupt') as said: again = benchmark(METHODS, out=tmp_path, executor=here, **WHAT)
    assert same(again, df) and len(said) == len(damage)
    for p, text in damage.items():
        assert p.with_name(p.name + '.corrupt').read_bytes() == text       # not deleted
        assert any(str(p) in str(w.message) for w in said)                 # named
        assert p.exists()                                                  # made again
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert same(benchmark(METHODS, out=tmp_path, executor=here, **WHAT), df)

def test_planted_runs_are_judged_by_what_was_planted(tmp_path, here):
    def oracle(evidence): return plant('chain', seed=evidence.task.seed, n=5).truth.mask()
    oracle.seeded = False
    df = benchmark([oracle, 'random'], out=tmp_path, executor=here, **WHAT | dict(tasks='chain'))
    assert (df[df.method == 'oracle'].roc_auc == 1).all() and (df[df.method == 'oracle'].average_precision == 1).all()
    assert df.n_true.tolist() == [len(plant('chain', seed=d, n=5).truth) for d in df.draw]
    assert (judge_table(df, {'chain': ['0.0']}).n_true == 1).all()
    assert paired(df, 'oracle', 'random').wins == 2
    assert leaderboard(df).frame.method.tolist() == ['oracle', 'random']

def test_a_failing_run_does_not_take_the_others(tmp_path, here):
    def half(evidence):
        if evidence.seed: raise KeyError('no such thing')
        return np.arange(evidence.n)
    with pytest.warns(UserWarning, match='4 of 20 runs failed'): df = benchmark([half, 'random', 'layer index'], out=tmp_path, executor=here, **WHAT)
    assert df[df.error.notna()].method.tolist() == ['half']*4 and df.error.dropna().str.contains('no such thing').all()
    assert len(finished(tmp_path)) == 16 and len(load_table(tmp_path)) == 20
    assert 'runs failed' in repr(leaderboard(df))

@pytest.mark.parametrize('methods, more, says', [
    ('mean diference', {}, "Did you mean 'mean difference'"), ('random', dict(tasks='chians'), "Did you mean 'chain'"),
    ('random', dict(models='plantd'), "Did you mean 'planted'"), ('random', dict(tasks='chain[noize=1]'), "Did you mean 'noise'"),
    ('random', dict(reference={'chian': ['0.0']}), "Did you mean 'chain'"), ([], {}, 'methods is empty'),
    ('random', dict(models='gpt2', tasks='ioi', n_pairs=1), 'n_pairs: expected whole numbers from 2 up'), (['random', 'random'], {}, 'two methods are called'),
    (lambda evidence: evidence, {}, 'other processes cannot import')])
def test_nonsense_is_refused_before_anything_runs(tmp_path, methods, more, says):
    with pytest.raises(InputError, match=says): benchmark(methods, **dict(out=tmp_path/'out', tasks='chain', models='planted', n_pairs=5) | more)
    assert not (tmp_path/'out').exists()

def test_a_truth_of_another_model_is_refused(tmp_path, here):
    with pytest.raises(InputError, match='another model'):
        benchmark('random', 'chain', 'planted', n_pairs=5, out=tmp_path, executor=here, reference={'chain': ['L11H10']})
    assert len(finished(tmp_path)) == 1                                    # what was run is kept, to be judged by another
    assert len(benchmark('random', 'chain', 'planted', n_pairs=5, out=tmp_path, executor=here)) == 1

def test_a_model_in_a_folder_and_a_task_in_a_file(tmp_path, here):
    from transformers import GPT2Config, GPT2LMHeadModel
    from circuit_sae.models.load import tiny_tokenizer
    from circuit_sae.data.prompts import ioi_task
    tokenizer, folder, pairs = tiny_tokenizer(), tmp_path/'model', tmp_path/'mine.jsonl'
    GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=4, n_embd=32, vocab_size=len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ioi_task(n=8).save(pairs)
    what = dict(models=str(folder), tasks=['ioi', str(pairs)], draws=(0, 1), n_pairs=6, out=tmp_path/'out', executor=here)
    with pytest.raises(InputError, match='no truth to judge'): benchmark('mean difference', **what)
    with pytest.raises(InputError, match='another model'): benchmark('mean difference', reference={'ioi': ['L2H0'], 'mine': None}, **what)
    df = benchmark('mean difference', reference={'ioi': ['L1H0'], 'mine': None}, **what)
    assert df.error.isna().all() and df.n_pairs.eq(6).all() and [len(s) for s in df.scores] == [8]*4
    assert df.roc_auc.notna().tolist() == [True, True, False, False] and df.forward.ge(12).all()
    assert df.scores[0] != df.scores[1] and df.scores[2] != df.scores[3]  # each draw has its own prompts
    ioi_task(n=9).save(pairs)                                              # the file changes: its runs are new, the others are not
    again = benchmark('mean difference', reference={'ioi': ['L1H0'], 'mine': None}, **what)
    assert (again.key == df.key).tolist() == [True, True, False, False]

def test_dask_on_a_local_cluster(tmp_path, slow_scorers):
    distributed = pytest.importorskip('distributed')
    methods = [slow_scorers.slow, lambda evidence: np.arange(evidence.n)]  # Dask can send what pickle cannot
    with distributed.LocalCluster(n_workers=1, threads_per_worker=2, processes=True, dashboard_address=None) as cluster, distributed.Client(cluster) as client:
        df = benchmark(methods, out=tmp_path/'out', executor=client.get_executor(pure=False), **WHAT | dict(tasks='chain'))
    assert df.error.isna().all() and df.roc_auc.notna().all() and len(df) == 8
    with ThreadPoolExecutor(1) as here: assert same(benchmark(methods, out=tmp_path/'out2', executor=here, **WHAT | dict(tasks='chain')), df)
