"""Read tables of every form, name every fault, and align prompts of unequal length; each test builds its own input."""

import codecs
import csv
import io
import json
import os
import re
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from circuit_sae.core import InputError, as_options, load_json, plain_console, save_json
from circuit_sae.data.batches import Alignment, align_pair, bind_task, check_pairs, pair_batches
from circuit_sae.data.prompts import get_task, ioi_task, tiny_tokenizer
from circuit_sae.data.readers import Example, read_examples, read_table
from circuit_sae.data.tasks import Encoder, Task

PAIRS = [Example(f'A {i}, b', f'A {i}; c', (f' d{i}',), (f' e{i}', ' f|g')) for i in range(3)]
ROWS = [e._asdict() for e in PAIRS]
PLAIN = [e._replace(wrong=e.wrong[:1]) for e in PAIRS]  # one text in every cell


def refused(code, data, **kwargs):
    "Return the message of the error that reading these data must raise."
    with pytest.raises(InputError) as e:
        read_examples(data, **kwargs)
    assert e.value.code == code, e.value
    return str(e.value)


def write(folder, name, content):
    "Write text as UTF-8, or bytes, and return the path."
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode('utf-8'))
    return path


def table(delimiter=',', names=('positive', 'negative', 'answer', 'wrong'), pairs=PLAIN, end='\r\n'):
    "Return pairs as the text of a CSV file."
    text = io.StringIO(newline='')
    writer = csv.writer(text, delimiter=delimiter, lineterminator=end)
    writer.writerows([names, *[(e.positive, e.negative, e.answer[0], e.wrong[0]) for e in pairs]])
    return text.getvalue()


@pytest.fixture(scope='module')
def tokenizer():
    return tiny_tokenizer(
        texts=[f'{e.positive}{e.answer[0]} {e.negative}{e.wrong[0]}' for e in ioi_task(n=200).examples]
    )


# Files


@pytest.mark.parametrize('delimiter', [',', ';', '\t', '|'])
@pytest.mark.parametrize(
    'names', [('positive', 'negative', 'answer', 'wrong'), ('Clean', 'CORRUPTED', 'answer', 'wrong')]
)
@pytest.mark.parametrize('kind', ['csv', 'tsv', 'txt'])
def test_any_delimiter(tmp_path, delimiter, names, kind):
    found = read_table(write(tmp_path, f'pairs.{kind}', table(delimiter, names)))
    assert found.examples == PLAIN
    assert ('separated' in found.note) == (delimiter != ',')
    assert ('Clean → positive' in found.note) == ('Clean' in names)


@pytest.mark.parametrize('mark', [b'', codecs.BOM_UTF8, 'utf-16', b'sep=;\r\n'])
@pytest.mark.parametrize('end', ['\n', '\r\n', '\r'])
def test_tables_of_spreadsheets(tmp_path, mark, end):
    text = table(';', end=end) + f';;;{end}'
    content = text.encode('utf-16') if mark == 'utf-16' else mark + text.encode('utf-8')
    assert read_examples(write(tmp_path, 'pairs.csv', content)) == PLAIN


@pytest.mark.parametrize('mark', ['\u2028', '\u2029', '\x85', '\x0b', '\x0c', '\x1c', '\x1d', '\x1e'])
def test_only_a_newline_ends_a_line(tmp_path, mark):
    odd = [Example(f'a{mark}b {i}', f'{mark}c', (f' d{mark}',), (' e',)) for i in range(2)]
    text = ''.join(json.dumps(e._asdict(), ensure_ascii=False) + '\n' for e in odd)
    assert read_examples(write(tmp_path, 'odd.jsonl', text)) == odd
    assert read_examples(write(tmp_path, 'odd.csv', table(pairs=odd))) == odd
    Task.from_data(odd).save(tmp_path / 'again.jsonl')
    assert Task.from_data(tmp_path / 'again.jsonl').examples == odd


def test_a_text_with_newlines_counts_as_one_row(tmp_path):
    odd = [e._replace(positive=e.positive.replace(', ', ',\n')) for e in PLAIN]
    text = table(pairs=odd) + 'A,,x,y\r\n'
    assert 'line 8: no value for negative' in refused('missing-column', write(tmp_path, 'pairs.csv', text))


@pytest.mark.parametrize('name', ['pairs.json', 'pairs.jsonl', 'pairs.ndjson'])
@pytest.mark.parametrize('indent', [None, 1])
def test_json_in_any_form(tmp_path, name, indent):
    forms = [ROWS, dict(prompts=ROWS), dict(note='x', data=ROWS), pd.DataFrame(ROWS).to_dict('list')]
    for form in forms:
        assert read_examples(write(tmp_path, name, json.dumps(form, indent=indent))) == PAIRS
    assert read_examples(write(tmp_path, name, '\n\n'.join(map(json.dumps, ROWS)))) == PAIRS
    assert read_examples(write(tmp_path, name, json.dumps(ROWS[0]))) == PAIRS[:1]


def test_lines_of_a_list_are_named(tmp_path):
    rows = [dict(positive='["a', negative='[{'), *ROWS, dict(positive='a'), dict(positive='b')]
    for form in rows, dict(note='"rows": [', rows=rows):
        text = json.dumps(form, indent=1)
        starts = [i for i, line in enumerate(text.split('\n'), 1) if line.strip() == '{' and i > 1]
        message = refused('missing-column', write(tmp_path, 'pairs.json', text))
        assert [int(x) for x in re.findall(r'line (\d+)', message)] == starts[-2:]


def test_parquet_and_datasets(tmp_path):
    datasets = pytest.importorskip('datasets')
    made = datasets.Dataset.from_list(json.loads(json.dumps(ROWS)))
    assert read_examples(made) == PAIRS
    assert read_examples(datasets.DatasetDict(train=made)) == PAIRS
    made.to_parquet(tmp_path / 'pairs.parquet')
    made.save_to_disk(tmp_path / 'saved')
    datasets.DatasetDict(a=made, b=made).save_to_disk(tmp_path / 'splits')
    assert read_examples(tmp_path / 'pairs.parquet') == PAIRS
    assert read_examples(tmp_path / 'saved') == PAIRS
    assert read_examples(tmp_path / 'splits' / 'a') == PAIRS
    assert read_examples(made.data.table) == PAIRS  # a table of pyarrow
    refused('splits', tmp_path / 'splits')
    refused('splits', datasets.DatasetDict(a=made, b=made))
    assert get_task(str(tmp_path / 'saved'), n=2).n == 2


# The forms of other tools


def test_eap_ig(tmp_path):
    text = ',clean,corrupted,corrupted_hard,correct_idx,incorrect_idx\n0,A,B,C,1000,2000\n1,D,E,F,"[3, 4]",5\n'
    assert read_examples(write(tmp_path, 'ioi.csv', text)) == [
        Example('A', 'B', (1000,), (2000,)),
        Example('D', 'E', (3, 4), (5,)),
    ]
    frame = pd.DataFrame(dict(clean=['A', 'D'], corrupted=['B', 'E'], correct_idx=[3, 4], incorrect_idx=[5.0, 6.0]))
    assert read_examples(frame)[1] == Example('D', 'E', (4,), (6,))
    for wrong in 'x', '-1', '1.5':
        refused(
            'answer-type', write(tmp_path, 'bad.csv', f'clean,corrupted,correct_idx,incorrect_idx\nA,B,1,{wrong}\n')
        )


def test_auto_circuit(tmp_path):
    rows = [dict(clean=e.positive, corrupt=e.negative, answers=e.answer, wrong_answers=e.wrong) for e in PAIRS]
    assert read_examples(write(tmp_path, 'task.json', json.dumps(dict(prompts=rows)))) == PAIRS
    rows = [dict(clean='A', corrupt='B', answers=[1, 2], wrong_answers=[3])]
    assert read_examples(write(tmp_path, 'task.json', json.dumps(dict(prompts=rows)))) == [
        Example('A', 'B', (1, 2), (3,))
    ]


def test_mib(tmp_path):
    row = dict(prompt='The sky is', choices=['red', 'blue', '-'], answerKey=1, counterfactual=dict(prompt='The sea is'))
    wanted = Example('The sky is', 'The sea is', (' blue',), (' red', '-'))
    assert read_examples(write(tmp_path, 'mib.jsonl', json.dumps(row))) == [wanted]
    assert read_examples([row | dict(answerKey='blue')]) == [wanted]
    other = row | dict(abc_counterfactual=dict(prompt='X'))
    del other['counterfactual']
    assert read_examples([other])[0].negative == 'X'
    labels = row | dict(prompt='Answer:\n', choices=dict(label=['A', 'B'], text=['x', 'y']), answerKey='B')
    assert read_examples([labels])[0][2:] == (('B',), ('A',))
    for key in 3, -1, None, 'green':
        refused('answer-type', [row | dict(answerKey=key)])


# Rows that cannot be used


def test_all_faults_at_once_by_line(tmp_path):
    text = table() + 'A,,x,y\r\nA,B,x,\r\nA,B,x,y,z\r\nA,B,x,y|\r\n'
    message = refused('bad-rows', write(tmp_path, 'pairs.csv', text))
    assert message.startswith('4 of 7 rows')
    for line in range(5, 9):
        assert f'line {line}' in message
    assert "'z'" in message and 'negative' in message and 'wrong' in message


def test_many_faults_stay_readable(tmp_path):
    message = refused('missing-column', write(tmp_path, 'pairs.csv', table() + 'A,,x,y\n' * 500))
    assert '500 of 503' in message and 'and 490 more' in message and len(message) < 2000


@pytest.mark.parametrize(
    'text', ['', 'When Mary and John went,When Mary,x,y\n', '{"positive": 1}\n', 'positive,answer\na,b\n']
)
def test_a_missing_header_names_the_columns(tmp_path, text):
    message = refused('missing-column', write(tmp_path, 'pairs.csv', text))
    assert 'positive, negative, answer, wrong' in message and 'line 1' in message


@pytest.mark.parametrize('extra', [dict(note=[1, 2]), dict(source='mine'), dict(seed=3), dict(note=[])])
def test_every_list_has_one_entry_a_pair(extra):
    lists = {k: [row[k] for row in ROWS] for k in ROWS[0]}
    assert read_examples(lists | dict(note=np.arange(3))) == PAIRS
    refused('list-lengths', lists | extra)


def test_values_that_are_missing():
    frame = pd.DataFrame([*ROWS, dict.fromkeys(ROWS[0])])
    assert read_examples(frame) == PAIRS  # an empty row of a sheet
    frame.loc[1, 'negative'] = None
    assert 'row 1: no value for negative' in refused('missing-column', frame)
    assert read_examples([dict(positive='A', negative='B', answer=None, wrong=float('nan'))]) == [Example('A', 'B')]
    ids = dict(answer=[np.int64(3)], wrong=np.array([4, 5]))
    assert read_examples([dict(positive='A', negative='B', **ids)]) == [Example('A', 'B', (3,), (4, 5))]
    for answer in True, 1.5, ['', ' a'], [[1]], dict(a=1):
        with pytest.raises(InputError):
            read_examples([dict(positive='A', negative='B', answer=answer, wrong=' b')])


def test_own_names_of_columns(tmp_path):
    path = write(tmp_path, 'pairs.csv', table(';', ['frage', 'gegenfrage', 'richtig', 'falsch']))
    refused('missing-column', path)
    names = dict(positive='frage', negative='gegenfrage', answer='richtig', wrong='falsch')
    assert read_examples(path, columns=names) == PLAIN
    refused('unknown-name', path, columns=names | dict(wrong='falsh'))


FAULTS = {
    'twice.csv': ('double-column', 'positive,negative,answer,answer,wrong\na,b, c, d, e\n'),
    'header.csv': ('no-rows', 'positive,negative,answer,wrong\n'),
    'empty.json': ('no-rows', '[]'),
    'splits.json': ('splits', '{"train": [{"positive": "a"}], "test": [{"positive": "a"}]}'),
    'deep.json': ('not-json', '[' * 100_000),
}


@pytest.mark.parametrize('name', FAULTS)
def test_files_that_must_be_refused(name, tmp_path):
    code, content = FAULTS[name]
    assert name in refused(code, write(tmp_path, name, content))


def test_invisible_characters_in_a_header(tmp_path):
    path = write(tmp_path, 'pairs.csv', '\u200bpositive,negative,answer\u200b,wrong\na,b, c, d\n')
    assert read_examples(path) == [Example('a', 'b', (' c',), (' d',))]


# Tasks


def test_every_pair_that_does_not_fit_is_named(tokenizer, tmp_path):
    examples = ioi_task(n=6).bind(tokenizer).examples
    examples[2] = examples[2]._replace(answer=(' Bartholomew',))
    examples[4] = examples[4]._replace(wrong=('Alice',))
    Task('x', examples).save(tmp_path / 'x.jsonl')
    with pytest.raises(InputError) as e:
        Task.from_data(tmp_path / 'x.jsonl', answer_token='one').tokens(tokenizer)
    assert e.value.code == 'answer-token'
    assert "x.jsonl' line 3): the answer ' Bartholomew'" in str(e.value)
    assert "x.jsonl' line 5): the wrong answer 'Alice'" in str(e.value)


def test_answers_as_token_ids_give_the_same_task(tokenizer):
    task = ioi_task(n=5).bind(tokenizer)
    tokens = task.tokens(tokenizer)
    ids = [e._replace(answer=a, wrong=w) for e, a, w in zip(task.examples, tokens.answers, tokens.wrongs)]
    assert Task('ids', ids).tokens(tokenizer).answers == tokens.answers
    with pytest.raises(InputError, match='another model'):
        Task('ids', [e._replace(answer=(10**6,)) for e in ids]).tokens(tokenizer)


def test_rows_used(tmp_path):
    path = write(tmp_path, 'pairs.csv', table(pairs=PLAIN * 200))
    task = get_task(str(path), n=250)
    assert task.rows_used(codes=250, attribution=20) == '600 pairs; 250 for codes, 20 for attribution'
    assert 'the first 250 of 600 pairs' in repr(task)
    assert '250' not in task.take(10).rows_used(codes=250)


def test_one_bos(tokenizer):
    encoder = Encoder(tokenizer)
    bos = tokenizer.bos_token
    assert encoder(f'{bos}Alice') == encoder('Alice')
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    try:
        for chat in True, 'Then':
            ids = Encoder(tokenizer, chat)('Alice')
            assert ids.count(tokenizer.bos_token_id) == 1
            assert tokenizer.decode(ids) == f'{bos}Alice\n' + ('Then' if chat == 'Then' else '')
        task = Task('chat', ioi_task(n=4).examples, chat='It was', equal_length=False)
        assert (
            task.tokens(tokenizer).answers
            == Task('plain', ioi_task(n=4).examples, equal_length=False).tokens(tokenizer).answers
        )
        assert task.bind(tokenizer).take(2).chat == 'It was' and task.settings['chat'] == 'It was'
    finally:
        tokenizer.chat_template = None
    with pytest.raises(InputError) as e:
        Task('chat', ioi_task(n=4).examples, chat=True).tokens(tokenizer)
    assert e.value.code == 'no-chat-template'


def lint(task, tokenizer):
    "Return the rules that a task breaks."
    return {problem.rule for problem in task.lint(tokenizer)}


def test_lint(tokenizer):
    examples = ioi_task(n=13).bind(tokenizer).examples
    assert lint(Task('fine', examples), tokenizer) == set()
    spaced = [e._replace(positive=e.positive + ' ', negative=e.negative + ' ') for e in examples]
    assert 'trailing space' in lint(Task('spaced', spaced, answer_token='first', equal_length=False), tokenizer)
    one = [examples[0]._replace(negative=examples[0].negative + ' '), *examples[1:]]
    assert 'trailing space' in lint(Task('one', one, equal_length=False), tokenizer)
    marked = [e._replace(positive=tokenizer.bos_token + e.positive) for e in examples]
    assert 'special token' in lint(Task('marked', marked, equal_length=False), tokenizer)
    assert 'pairs' in lint(Task('few', examples[:9]), tokenizer)


# Prompts of unequal length


def align(a, b):
    "Return the alignment of two texts; `·` splits a word into tokens."
    names = [text.replace(' ', ' Ġ').replace('·', ' ').split() for text in (a, b)]
    vocabulary = {name: i for i, name in enumerate(sorted({*names[0], *names[1]}))}
    return align_pair(*([vocabulary[name] for name in n] for n in names), names), names


CASES = [
    ('Then Emma gave it', 'Then Fe·lix gave it'),
    ('Then Fe·lix gave it', 'Then Emma gave it'),
    ('Then Emma and Jo·han·na ran', 'Then Fe·lix and Paul ran'),
    ('Then slowly Emma ran', 'Then Emma ran'),
    ('Emma ran', 'Then Em·ma ran'),
    ('a b c', 'x'),
    ('x', 'a b c'),
    ('to the sta·tion , Jo gave it to', 'to the bank , so Mar·y Ann gave it to'),
]


@pytest.mark.parametrize('pair', CASES)
def test_alignment_covers_both_prompts_in_order(pair):
    found, (p_names, q_names) = align(*pair)
    assert isinstance(found, Alignment)
    for side, names in enumerate((p_names, q_names)):
        positions = [int(p) for p in found.columns[:, side] if p >= 0]
        assert positions == list(range(len(names)))
    assert found.partners.min() >= 0 and found.partners.max() < len(q_names)
    assert all(a <= b for a, b in pairwise(found.partners))
    exact = {int(p): int(q) for p, q in found.columns if p >= 0 and q >= 0}
    assert {p: int(found.partners[p]) for p in np.flatnonzero(found.exact)} == exact


def test_alignment_of_names():
    assert align(*CASES[0])[0].partners.tolist() == [0, 2, 3, 4]
    assert align(*CASES[1])[0].partners.tolist() == [0, 1, 1, 2, 3]
    assert align(*CASES[2])[0].partners.tolist() == [0, 2, 3, 4, 4, 4, 5]
    assert align(*CASES[3])[0].partners.tolist() == [0, 0, 1, 2]
    found, (p_names, q_names) = align(*CASES[7])
    assert q_names[found.partners[p_names.index('ĠJo')]] == 'ĠAnn'
    assert q_names[found.partners[p_names.index('tion')]] == 'Ġbank'


def test_the_cut_into_tokens_does_not_matter():
    "The last token of every word has the same partner word, whatever the pieces."
    for a, b in (('Then Felix gave it', 'Then Ma ry Ann gave it'), ('So Anna met Bob', 'So the old Eva met Bob')):
        words = None
        for cut in 1, 2, 3:
            pieces = [
                ' '.join('·'.join(w[i : i + cut] for i in range(0, len(w), cut)) for w in t.split()) for t in (a, b)
            ]
            found, names = align(*pieces)
            number = [np.cumsum([i == 0 or n.startswith('Ġ') for i, n in enumerate(side)]) for side in names]
            last = [i for i in range(len(names[0])) if i + 1 == len(names[0]) or number[0][i + 1] > number[0][i]]
            now = [int(number[1][found.partners[i]]) for i in last]
            assert words in (None, now)
            words = now


def test_equal_lengths_correspond_by_position():
    found = align_pair([1, 2, 3, 4], [1, 3, 4, 4])
    assert found.partners.tolist() == [0, 1, 2, 3] and found.exact.all()


def test_batches_use_the_partners(tokenizer):
    examples = [
        e._replace(negative='Well, ' + e.negative) if i % 3 else e for i, e in enumerate(ioi_task(n=9).examples)
    ]
    bound = bind_task(tokenizer, Task('uneven', examples, equal_length=False))
    n = bound.n
    for pad in True, False:
        for batch in pair_batches(bound, 4, pad=pad):
            values = np.arange(batch.negatives.size).reshape(batch.negatives.shape)
            moved = batch.at_partners(values)
            deep = batch.at_partners(np.stack([values, -values]), axis=2)
            assert moved.shape == batch.positives.shape and (deep[1] == -moved).all()
            for k, i in enumerate(batch.pairs):
                partners = bound.align(i).partners
                assert (moved[k, : len(partners)] == values[k, partners]).all()
                same = [bound.tokens.ids[i][p] == bound.tokens.ids[i + n][q] for p, q in enumerate(partners)]
                assert np.mean(same) > 0.7
    check_pairs(bound, equal_length=False)
    with pytest.raises(InputError, match='pair 1 .*5 more of 9') as e:
        check_pairs(bound)
    assert e.value.code == 'pair-lengths'


def last_token(strings, word):
    "Return the position of the last token of a word."
    ends = np.cumsum([len(text) for text in strings])
    text = ''.join(strings)
    return int(np.searchsorted(ends, text.index(word) + len(word)))


@pytest.mark.parametrize('chat', [False, True])
@pytest.mark.parametrize('template, partner', [(None, 'Alice'), ('Then {who} met {other}', 'Smith')])
def test_a_template_names_the_spans(tokenizer, chat, template, partner):
    rows = [dict(positive='Then Alice met Leo', negative='Then Alice Smith met Leo')] * 2
    tokenizer.chat_template = "{{ bos_token }}Say: {{ messages[0]['content'] }}\n" if chat else None
    try:
        bound = bind_task(tokenizer, Task.from_data(rows, equal_length=False, chat=chat, template=template))
        positive, negative = (bound.task.encoder().strings(bound.tokens.ids[r]) for r in (0, 2))
    finally:
        tokenizer.chat_template = None
    found = bound.align(0)
    for word, other in (('Alice', partner), (' met', ' met'), ('Leo', 'Leo'), ('Then', 'Then')):
        assert found.partners[last_token(positive, word)] == last_token(negative, other)
    if template:
        with pytest.raises(InputError) as e:
            bind_task(tokenizer, Task.from_data(rows, equal_length=False, template='Then {who} saw {other}')).align(0)
        assert e.value.code == 'template'


# Locale, console and command line


def test_files_are_utf8_and_consoles_survive(tmp_path):
    "Run under an ASCII locale, with a console that has few characters."
    code = """
import sys
from circuit_sae.core import plain_console, save_json
from circuit_sae.data.tasks import Task
plain_console()
save_json('x.json', dict(task='\\u540d\\u524d', file='caf\\udce9'))
pairs = [dict(positive='\\u540d 1', negative='\\u540d 2', answer=' \\u00e9', wrong=' x')] * 2
Task.from_data(pairs).save('x.jsonl')
print(Task.from_data('x.jsonl'), 'L0H1 \\u2192 \\u22120.5 \\u2026')
"""
    env = dict(
        os.environ, LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0', PYTHONIOENCODING='cp1252', PYTHONPATH=str(ROOT)
    )
    r = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=env, capture_output=True)
    assert r.returncode == 0, r.stderr
    assert 'L0H1 -> -0.5 \u2026'.encode('cp1252') in r.stdout and '\u00e9'.encode('cp1252') in r.stdout
    assert load_json(tmp_path / 'x.json') == dict(task='\u540d\u524d', file='caf\udce9')
    assert '\u540d' in (tmp_path / 'x.jsonl').read_text(encoding='utf-8')


@pytest.mark.parametrize('encoding', ['ascii', 'cp1252', 'cp437', 'utf-8'])
def test_any_console(encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    plain_console(stream)
    stream.write('\u2192\u2212\u2265\u540d\U0001f389\udce9e\u0301\n')
    stream.flush()
    text = stream.buffer.getvalue().decode(encoding)
    assert ('\u2192' in text) if encoding == 'utf-8' else text.startswith('->')


def test_a_stream_without_encoding_is_left_alone():
    plain_console(io.StringIO())


def test_json_of_numpy_and_surrogates(tmp_path):
    save_json(tmp_path / 'x.json', dict(a=np.arange(2), b='\ud800'))
    assert load_json(tmp_path / 'x.json') == dict(a=[0, 1], b='\ud800')


def test_advice_names_only_options_that_exist():
    options = {'n_train': '--n_train', 'confirm=False': '--no-confirm'}
    assert as_options('`n_train=5`, `confirm=False` or `seeds=3`', options) == '--n_train 5, --no-confirm or `seeds=3`'
    assert as_options('`confirm=True`', options) == '`confirm=True`'
