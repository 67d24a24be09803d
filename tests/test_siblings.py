"""Siblings of the inputs that once failed, made up apart from the fixes: files, folders of models, models, commands.

A sibling is read, or refused with the code of its fault. No model is larger than a few layers.
"""

import codecs
import copy
import csv
import io
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from transformers import FalconH1Config, JambaConfig, Lfm2Config, LlamaConfig, Qwen3MoeConfig

from circuit_sae.causal.patching import patch_heads
from circuit_sae.codes.activations import cache_head_acts
from circuit_sae.core import InputError, refuses, save_json
from circuit_sae.data.batches import bind_task
from circuit_sae.data.prompts import get_task, induction_task, ioi_task, tiny_tokenizer
from circuit_sae.data.readers import Example, read_examples, read_table
from circuit_sae.data.tasks import Task
from circuit_sae.models.forward import run
from circuit_sae.models.load import load_model, save_random_model, tiny_model
from circuit_sae.models.support import unfit_for
from circuit_sae.models.writes import attention_layers
from circuit_sae.score.flow import difference_flow

NAMES = [('Ann', 'Bob', 'Carl'), ('Tom', 'Sue', 'Kim'), ('Ron', 'Pat', 'Lee')]
START = 'When {} and {} left; the "shop", '
PAIRS = [
    Example(START.format(a, b) + f'{b} gave it to', START.format(a, b) + f'{c} gave it to', (f' {a}',), (f' {b}',))
    for a, b, c in NAMES
]
ROWS = [dict(positive=e.positive, negative=e.negative, answer=e.answer[0], wrong=e.wrong[0]) for e in PAIRS]


def table(delimiter=',', end='\n', header=None, rows=ROWS, **settings):
    "Return `ROWS` as the text of a CSV file."
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator=end, **settings)
    writer.writerow(header or rows[0])
    writer.writerows(row.values() for row in rows)
    return text.getvalue()


def write(folder, name, content, encoding='utf-8'):
    "Write a file and return its path."
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return path


def lines(rows, end='\n'):
    "Return objects as JSON lines."
    return end.join(json.dumps(row) for row in rows)


# Files that are read

CLEAN = dict(positive='clean', negative='corrupted')
MIB = [
    dict(prompt=e.positive, choices=[e.answer[0].strip(), e.wrong[0].strip()], answerKey=0, metadata=dict(subject='x'))
    for e in PAIRS
]


def flipped(row, pair, **others):
    "Return a row of MIB with the counterfactual that its circuit track uses, and others before it."
    return row | others | dict(s2_io_flip_counterfactual=dict(prompt=pair.negative, choices=['Q'], answerKey=0))


READ = {
    'tabs.csv': table('\t'),
    'bars.txt': table('|'),
    'commas.tsv': table(),
    'every cell in quotes.csv': table(';', quoting=csv.QUOTE_ALL),
    'sep in quotes.csv': '"sep=;"\n' + table(';'),
    'carriage returns.csv': table(end='\r'),
    'empty rows and columns.csv': '\n'.join(f'{line};;' for line in table(';').splitlines()) + '\n;;;;;\n\n',
    'utf-16 big endian.csv': codecs.BOM_UTF16_BE + table('\t').encode('utf-16-be'),
    'utf-32.csv': table().encode('utf-32'),
    'capitals.csv': table(header=['Clean prompt', ' CORRUPTED-PROMPT', 'Answer ', 'Wrong answer']),
    'lines.txt': lines(ROWS),
    'mark and carriage returns.jsonl': codecs.BOM_UTF8 + lines(ROWS, '\r\n\r\n').encode(),
    'one line.json': json.dumps(dict(made_by='me', data=ROWS)),
    'columns.json': json.dumps({k: [row[k] for row in ROWS] for k in ROWS[0]}),
    'columns of pandas.json': json.dumps({k: {i: row[k] for i, row in enumerate(ROWS)} for k in ROWS[0]}),
    'named rows.json': json.dumps({f'pair {i}': row for i, row in enumerate(ROWS)}),
    'utf-16.json': json.dumps(ROWS).encode('utf-16'),
    'lines of auto-circuit.jsonl': lines(
        dict(clean=e.positive, corrupt=e.negative, answers=e.answer, wrong_answers=e.wrong) for e in PAIRS
    ),
    'mib.jsonl': lines(flipped(row, e, abc_counterfactual=dict(prompt='other')) for row, e in zip(MIB, PAIRS)),
    'letters of mib.json': json.dumps([flipped(row | dict(answerKey='A'), e) for row, e in zip(MIB, PAIRS)]),
    'mib with a text.jsonl': lines(row | dict(counterfactual=e.negative) for row, e in zip(MIB, PAIRS)),
}


@pytest.mark.parametrize('name', READ)
def test_files_that_are_read(name, tmp_path):
    assert read_examples(write(tmp_path, name, READ[name])) == PAIRS


def test_arithmetic_of_mib():
    others = dict(ones_carry_counterfactual=dict(prompt='9 + 1 =', label=10))
    row = dict(prompt='21 + 11 =', label='32', **others, random_counterfactual=dict(prompt='20 + 9 =', label=29))
    found = read_table([row])
    assert found.examples == [Example('21 + 11 =', '20 + 9 =', (' 32',), (' 29',))]
    assert 'random_counterfactual → negative, not ones_carry_counterfactual' in found.note


@pytest.mark.parametrize(
    'names, cells, ids',
    [
        (['correct_idx', 'incorrect_idx'], ['100.0', '200.0'], [(100,), (200,)]),
        (['answers_idx', 'corrupted_answers_idx'], ['[100, 101]', '[200]'], [(100, 101), (200,)]),
        (['country_idx', 'corrupted_country_idx'], ['100', '200'], [(100,), (200,)]),
    ],
)
def test_token_ids_of_eap_ig(names, cells, ids, tmp_path):
    rows = [dict(zip(['clean', 'corrupted', *names], [e.positive, e.negative, *cells])) for e in PAIRS]
    assert read_examples(write(tmp_path, 'task.csv', table(rows=rows)))[1] == PAIRS[1]._replace(
        answer=ids[0], wrong=ids[1]
    )


def test_columns_that_are_not_read_are_named(tmp_path):
    "A column of labels under an unknown name does not silently make a task without answers."
    found = read_table(write(tmp_path, 'sva.csv', 'clean,corrupted,plural\nA,B,1\nC,D,0\n'))
    assert found.examples[0] == Example('A', 'B') and 'no column of answers, and not read: plural' in found.note
    assert 'not read' not in read_table([ROWS[0] | dict(source='mine')]).note


# Files that are refused

BAD = [row | dict(positive='Café' + row['positive']) for row in ROWS]
REFUSED = {
    'Latin.csv': (table(rows=BAD).encode('cp1252'), 'not-utf8'),
    'no mark.csv': (table().encode('utf-16-le'), 'not-utf8'),
    'workbook.csv': (b'PK\x03\x04' + bytes(30), 'not-utf8'),
    'workbook.xlsx': (b'PK\x03\x04' + bytes(30), 'unknown-name'),
    'carets.csv': (table('^'), 'missing-column'),
    'a title first.csv': ('My task;;;\n' + table(';'), 'missing-column'),
    'no header.csv': (table().partition('\n')[2], 'missing-column'),
    'short row.csv': (table() + 'one cell\n', 'missing-column'),
    'all rows short.csv': ('positive,negative\nA\nB\n', 'missing-column'),
    'open quote.csv': ('positive,negative,answer,wrong\nA,B, c, d\n"E,F, g, h\nI,J, k, l\n', 'open-quote'),
    'spaces before quotes.csv': ('positive,negative\n"A, b", "C, d"\n', 'too-many-cells'),
    'backslashes.csv': (table(doublequote=False, escapechar='\\'), 'too-many-cells'),
    'two answers.csv': (table(header=['positive', 'negative', 'answer', 'Answer']), 'double-column'),
    'half a character.jsonl': (lines([row | dict(positive='\ud83d') for row in ROWS]), 'half-character'),
    'half an answer.jsonl': (lines([row | dict(answer=' \udc00') for row in ROWS]), 'half-character'),
    'messages.jsonl': (lines([row | dict(positive=[dict(role='user')]) for row in ROWS]), 'prompt-type'),
    'other names.jsonl': (lines([ROWS[0], dict(clean='A', corrupted='B')]), 'missing-column'),
    'Python.json': (repr(ROWS), 'not-json'),
    'mib.jsonl': (lines(MIB), 'missing-column'),
    'years of eap-ig.csv': ('clean,corrupted,correct_idx\nA,B,21\n', 'missing-column'),
    'prompts as ids.json': (json.dumps(dict(prompts=[dict(clean=[1], corrupt=[2])])), 'prompt-type'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_files_that_are_refused(name, tmp_path):
    content, code = REFUSED[name]
    with refuses(code):
        read_examples(write(tmp_path, name, content))


@pytest.mark.parametrize(
    'name, said',
    [
        ('open quote.csv', 'line 3'),
        ('spaces before quotes.csv', 'Delete the space'),
        ('backslashes.csv', 'as two'),
        ('no mark.csv', 'CSV UTF-8'),
        ('workbook.xlsx', 'CSV UTF-8'),
        ('carets.csv', 'Rename the columns'),
    ],
)
def test_messages_say_what_to_do(name, said, tmp_path):
    with pytest.raises(InputError, match=said):
        read_examples(write(tmp_path, name, REFUSED[name][0]))


def test_objects_in_one_line_are_numbered():
    with pytest.raises(InputError, match='row 1'):
        read_examples([ROWS[0], dict(positive='A')])


def test_names_of_tasks(tmp_path, monkeypatch):
    "A path that does not exist is a missing file, and an empty name is not the folder in which we are."
    monkeypatch.chdir(tmp_path)
    write(tmp_path, 'pairs.csv', table())
    assert len(get_task('pairs.csv')) == 3
    for name, code in {'no_such_folder/': 'no-file', 'C:\\pairs.csv': 'no-file', '': 'unknown-name'}.items():
        with refuses(code):
            get_task(name)


# Prompts

LINTED = {
    'a marker of another model': (dict(positive='[INST] {}', negative='[INST] {}'), 'marker'),
    'turns of another model': (dict(positive='<start_of_turn>user\n{}', negative='<start_of_turn>user\n{}'), 'marker'),
    'another BOS': (dict(positive='<s>{}', negative='<s>{}'), 'marker'),
    'the own BOS in one prompt': (dict(negative='<|endoftext|>{}'), 'special token'),
    'a tab at the end': (dict(positive='{}\t', negative='{}\t'), 'trailing space'),
    'a no-break space at the end': (dict(negative='{}\u00a0'), 'trailing space'),
    'answers that end in a space': (dict(answer='{} '), 'answer space'),
    'wrong answers with two spaces': (dict(wrong=' {}'), 'answer space'),
}


@pytest.mark.parametrize('name', LINTED)
def test_prompts_that_are_linted(name, tokenizer):
    forms, rule = LINTED[name]
    examples = ioi_task(n=12).examples
    rows = [e._asdict() | dict(answer=e.answer[0], wrong=e.wrong[0]) for e in examples]
    assert Task.from_data(rows).lint(tokenizer) == []
    rows = [{k: forms.get(k, '{}').format(text) for k, text in row.items()} for row in rows]
    assert rule in {problem.rule for problem in Task.from_data(rows).lint(tokenizer)}


@pytest.fixture(scope='module')
def tokenizer():
    return tiny_tokenizer()


def test_a_marker_of_the_own_template_stands_as_text(tokenizer):
    "A template may use markers that are no special tokens, as that of Llama 2 does."
    rows = [e._replace(positive=f'[INST] {e.positive}', negative=f'[INST] {e.negative}') for e in ioi_task(12).examples]
    own = copy.deepcopy(tokenizer)
    own.chat_template = '[INST] {{ messages[0].content }} [/INST]'
    assert [problem.rule for problem in Task.from_data(rows).lint(own)] == ['special token']


# Folders of models

SIZE = dict(vocab_size=len(tiny_tokenizer()), hidden_size=16, num_hidden_layers=3, max_position_embeddings=128)
HEADS = SIZE | dict(intermediate_size=32, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    "Return the folder of a random Llama, and its weights."
    folder = tmp_path_factory.mktemp('base')
    save_random_model(LlamaConfig(**HEADS, head_dim=4), folder)
    return folder, load_file(folder / 'model.safetensors')


def part(weights, text):
    "Return the weights without those whose name has this text."
    return {name: w for name, w in weights.items() if text not in name}


def shards(folder, weights, missing=False):
    "Write the weights as two files with an index."
    (folder / 'model.safetensors').unlink()
    names = list(weights)
    where = {name: f'model-0000{1 + (i > 9)}-of-00002.safetensors' for i, name in enumerate(names)}
    for file in sorted(set(where.values()))[: 1 if missing else 2]:
        save_file({name: weights[name] for name in names if where[name] == file}, folder / file)
    save_json(folder / 'model.safetensors.index.json', dict(metadata={}, weight_map=where))


def cut(name, n):
    "Return a function that keeps the first `n` bytes of a file."
    return lambda folder, weights: write(folder, name, (folder / name).read_bytes()[:n])


def config(**changes):
    "Return a function that changes the configuration."
    return lambda folder, weights: save_json(
        folder / 'config.json', json.loads((folder / 'config.json').read_text()) | changes
    )


def renamed(old, new):
    "Return a function that changes the names of weights."
    return lambda folder, weights: save_file(
        {name.replace(old, new): w for name, w in weights.items()}, folder / 'model.safetensors'
    )


def with_lora(folder, weights):
    "Write weights with an adapter that was not merged."
    own = {f'model.layers.0.self_attn.q_proj.lora_{k}.weight': torch.ones(2, 16) for k in 'AB'}
    save_file(weights | own, folder / 'model.safetensors')


FOLDERS = {
    'parallel training': (renamed('model.', 'module.model.'), 'weights-do-not-fit', ''),
    'base layers of peft': (renamed('q_proj.', 'q_proj.base_layer.'), 'weights-do-not-fit', 'base_layer'),
    'an adapter inside': (with_lora, 'weights-do-not-fit', 'not merged'),
    'half of the layers': (
        lambda f, w: save_file(part(w, '.2.'), f / 'model.safetensors'),
        'weights-do-not-fit',
        '.2.',
    ),
    'more layers': (config(num_hidden_layers=4), 'weights-do-not-fit', '.3.'),
    'fewer layers': (config(num_hidden_layers=2), 'weights-do-not-fit', 'more layers'),
    'a larger vocabulary': (config(vocab_size=SIZE['vocab_size'] + 8), 'weights-do-not-fit', 'another shape'),
    'other keys and values': (config(num_key_value_heads=4), 'weights-do-not-fit', 'k_proj'),
    'whole numbers': (
        lambda f, w: save_file({k: (9 * v).to(torch.int8) for k, v in w.items()}, f / 'model.safetensors'),
        'packed-weights',
        'I8',
    ),
    'a shard is missing': (lambda f, w: shards(f, w, missing=True), 'damaged-weights', '00002'),
    'no weights': (cut('model.safetensors', 0), 'damaged-weights', ''),
    'half a configuration': (cut('config.json', 99), 'not-json', ''),
    'a list for a configuration': (lambda f, w: write(f, 'config.json', '[]'), 'damaged-weights', ''),
    'half a tokenizer': (cut('tokenizer.json', 3000), 'not-json', 'tokenizer.json'),
    'an unknown architecture': (config(model_type='mine', architectures=['Mine']), 'unsupported-model', 'not know'),
    'four bits': (config(quantization_config=dict(quant_method='awq', bits=4)), 'packed-weights', ''),
}


def copied(base, tmp_path):
    "Return a copy of a folder."
    return shutil.copytree(base, tmp_path / 'model')


@pytest.mark.parametrize('name', FOLDERS)
def test_folders_that_are_refused(name, base, tmp_path):
    make, code, said = FOLDERS[name]
    folder = copied(base[0], tmp_path)
    make(folder, base[1])
    with pytest.raises(InputError) as e:
        load_model(folder)
    message = str(e.value)
    assert e.value.code == code and said in message and len(message) < 1000, message


@pytest.mark.parametrize('make', [shards, renamed('model.', '')])
def test_folders_that_are_loaded(make, base, tmp_path):
    folder = copied(base[0], tmp_path)
    make(folder, base[1])
    found = dict(load_model(folder).original_model.named_parameters())
    embedding = next(w for name, w in found.items() if 'embed_tokens' in name)
    torch.testing.assert_close(embedding.detach(), base[1]['model.embed_tokens.weight'])


# Models

MAMBA = dict(mamba_d_ssm=16, mamba_n_heads=4, mamba_d_head=4, mamba_d_state=4, mamba_chunk_size=8)
JAMBA = dict(mamba_d_state=4, mamba_d_conv=4, mamba_dt_rank=4, use_mamba_kernels=False, num_experts=2)
MODELS = {
    'state-space model beside attention': (FalconH1Config(**HEADS, head_dim=4, **MAMBA), [0, 1, 2], "'mamba'"),
    'state-space layers': (
        JambaConfig(**HEADS, **JAMBA, attn_layer_period=2, attn_layer_offset=1),
        [1],
        'no attention',
    ),
    'convolutions': (
        Lfm2Config(**HEADS, layer_types=['conv', 'full_attention', 'conv'], block_ff_dim=32),
        [1],
        'no attention',
    ),
    'experts': (
        Qwen3MoeConfig(**HEADS, head_dim=8, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8),
        [0, 1, 2],
        None,
    ),
}


@pytest.mark.parametrize('name', MODELS)
def test_models_run_in_full_or_are_refused(name, tmp_path):
    "Stages that start the negative behind the common beginning give what the whole prompt gives, or are refused."
    settings, layers, missing = MODELS[name]
    model = save_random_model(settings, tmp_path)
    assert attention_layers(model) == layers
    bound = bind_task(model, induction_task(n=2))
    acts = cache_head_acts(bound)
    for row, ids in enumerate(bound.tokens.ids):
        whole = {}
        run(model, [ids], lambda layer, z, whole=whole: whole.update({layer: z[0].mean(0)}))
        for layer in layers:
            found = acts.z[row][layer]
            torch.testing.assert_close(found, whole[layer], atol=1e-5, rtol=1e-4)
    assert np.nanmax(np.abs(patch_heads(bound).effect)) > 0
    problems = ' '.join(unfit_for(model, 'flow'))
    assert missing in problems if missing else not problems


def test_different_stages_in_three_threads():
    "Stages that read, patch and differentiate the same model at once give what they give alone."
    bound = bind_task(tiny_model(), induction_task(n=6))
    stages = [
        lambda: patch_heads(bound).effect,
        lambda: difference_flow(bound).values,
        lambda: cache_head_acts(bound).z.numpy(),
    ]
    alone = [stage() for stage in stages]
    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(stage) for stage in stages * 3]
        for k, job in enumerate(jobs):
            np.testing.assert_array_equal(job.result(), alone[k % 3])


# Commands


def command(folder, *arguments, **settings):
    "Run the command line in a new process."
    environment = os.environ | dict(PYTHONPATH=str(ROOT))
    run = [sys.executable, '-m', 'circuit_sae', *arguments]
    return subprocess.run(run, cwd=folder, env=environment, text=True, timeout=60, **settings)


@pytest.mark.parametrize(
    'arguments, said',
    [
        (['find', 'ioi', '--n', '0'], '0 pairs'),
        (['check', ''], 'unknown task'),
        (['check', 'no_such_folder/'], 'no file'),
        (['check', 'other.csv'], 'Rename the columns'),
    ],
)
def test_commands_that_are_refused(arguments, said, tmp_path):
    write(tmp_path, 'other.csv', 'a;b\nc;d\n')
    r = command(tmp_path, *arguments, capture_output=True)
    assert r.returncode == 2 and said in r.stderr and 'Traceback' not in r.stderr, r.stderr


def test_output_may_be_closed(tmp_path):
    r = command(tmp_path, 'tasks', stderr=subprocess.PIPE, preexec_fn=lambda: os.close(1))
    assert (r.returncode, r.stderr) == (0, '')
