"Test the certificate: broken tasks are refused for their own reason, the page is complete, the exit status is right."

import json
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from circuit_sae.cli import main
from circuit_sae.core import InputError, all_heads
from circuit_sae.data.prompts import ioi_task
from circuit_sae.data.tasks import Task
from circuit_sae.find import find_circuit
from circuit_sae.models.load import load_model
from circuit_sae.trust.audit import AUDIT_STAGES, Audit, compare_sums, expected_rivals, pairs_needed, prompts_sha256
from circuit_sae.trust.certificate import Certificate, certify, load_certificate, preview
from circuit_sae.truth.planted import plant

BROKEN = dict(
    cannot=lambda exs: [e._replace(answer=e.wrong, wrong=e.answer) for e in exs],
    same=lambda exs: [e._replace(negative=e.positive) for e in exs],
    few=lambda exs: exs[:3],
)
QUICK = dict(n_draws=20, seeds=range(2), n_causal=5)


def rules(reasons):
    return [r.rule for r in reasons]


@pytest.fixture(scope='module')
def planted():
    return plant('induction', 0, 4, 10, n=60)


@pytest.fixture(scope='module')
def found(planted):
    return find_circuit(planted.model, planted.task, preset='quick', fdr=0.05, d_sae=100)


@pytest.fixture(scope='module')
def by_codes(planted):
    return find_circuit(planted.model, planted.task, score='unique codes', fdr=0.05, d_sae=100)


@pytest.fixture(scope='module')
def good(found, planted):
    return certify(found, planted.model, circuit=planted.truth, truth=planted.truth)


def check_refused(model, examples, rule, **settings):
    "The task is refused for its own reason and no other, in the first stage, and the page says so first."
    cert = certify(find_circuit(model, Task('broken', examples), n_train=6, n_epochs=5, **settings), model)
    assert not cert and not cert.ok and cert.verdict == 'Not certified'
    assert rules(cert.fatal) == [rule] and cert.fatal[0].advice
    assert cert.not_run == ['stability', 'causes'] and list(cert.seconds)[-1] == 'behaviour'
    text = cert.to_markdown()
    assert text.startswith('# Not certified') and text.index(f'1. **{rule}**') < text.index('## Behaviour')
    assert cert.fatal[0].message in cert.summary
    return cert


def test_broken_task_in_a_real_model():
    "Swapped answers; other broken tasks are those of a planted model below."
    model = load_model('smollm2-135m')
    examples = ioi_task(n=13).bind(model).examples  # as many pairs as 270 heads need
    check_refused(model, BROKEN['cannot'](examples), 'cannot', top_k=8, score_pairs=2)


@pytest.mark.parametrize('rule', BROKEN)
@pytest.mark.parametrize('family', ['lookup', 'chain'])
def test_broken_planted_task(family, rule):
    p = plant(family, 1, n=30)
    check_refused(p.model, BROKEN[rule](p.task.examples), rule, d_sae=50)


def test_pairs_needed_is_where_a_head_can_first_stand_out():
    for n_heads in (24, 144, 270, 1200):
        for fdr in (0.2, 0.05, 0.01):
            n = pairs_needed(n_heads, fdr)
            assert n_heads * 2.0**-n <= fdr < n_heads * 2.0 ** (1 - n)


def test_copies_of_a_pair_count_once():
    p = plant('chain', 1, n=30)
    check_refused(p.model, p.task.examples[:5] * 6, 'few', d_sae=50)


def test_the_true_circuit_is_certified(good, planted):
    inside = [h['head'] for h in good.heads if h['in_circuit']]
    assert good and good.verdict == 'Certified' and not good.not_run
    assert inside == good.circuit['heads'] and {*inside} == {str(h) for h in planted.truth}
    assert all(h['effect'] > 0.3 for h in good.heads if h['true'])
    assert good.causes['faithfulness'] > 0.9 and abs(good.causes['left']) < 0.1
    assert good.hashes['prompts_sha256'] == prompts_sha256(planted.task, planted.model)


def test_stages_about_codes_run_only_if_codes_chose_the_heads(good, found, by_codes, planted):
    assert not good.by_codes and {'association', 'health', 'diversity'}.isdisjoint(good.record)
    assert 'autoencoder' not in good.hashes and '| autoencoder' not in good.to_markdown()
    assert list(good.seconds) == ['behaviour', 'stability', 'causes']
    audit = Audit(by_codes, planted.model)
    assert audit.by_codes and not audit.by_attribution and audit.stages == list(AUDIT_STAGES)
    audit = Audit(found, planted.model)  # a false discovery rate of the attribution
    assert audit.by_attribution and not audit.by_codes and audit.stages == ['behaviour', 'stability', 'causes']
    text = certify(by_codes, planted.model, stop=False, **QUICK).to_markdown()
    assert '## The autoencoder and its codes' in text and '| autoencoder' in text


@pytest.mark.parametrize('family', ['induction', 'chain'])
def test_what_find_returns_is_certified(family):
    "The confirmed heads are the planted ones; the certificate uses the effects that chose them, and agrees with find."
    p = plant(family, 2, n=40)
    found = find_circuit(p.model, p.task, n_epochs=5, d_sae=50)
    assert set(found.circuit) == set(p.truth)
    said = preview(found, p.model)
    assert said.startswith(f'Certificate so far: {len(found.circuit)} of {len(found.circuit)} heads have an effect')
    cert = certify(found, p.model, n_draws=20, n_causal=5)
    assert cert and not cert.not_run and list(cert.seconds) == ['behaviour', 'stability', 'causes']
    assert all(h['effect'] == found[h['head']]['effect'] for h in cert.heads if h['in_circuit'])
    assert cert.causes['heads_on'] == found.confirmation.n_used and cert.causes['fresh']


@pytest.mark.parametrize('reversed_', [False, True])
def test_find_expects_that_random_heads_do_as_well(reversed_):
    "With a planted head that works against the answer, random sets do better: find warns, and the certificate refuses."
    p = plant('induction', 0, n_layers=2, n_heads=3, n=40, copies=2)
    last = max(p.truth)
    if reversed_:
        weight = p.model.blocks[last.layer].attn.o.original_component.weight
        width = weight.shape[1] // 3
        weight.data[:, last.head * width : (last.head + 1) * width] *= -0.5
    found = find_circuit(p.model, p.task, n_epochs=2, d_sae=50)
    rivals = expected_rivals(Audit(found, p.model))
    assert (rivals.reach > 0) == rivals.likely == reversed_
    assert str(rivals) in preview(found, p.model) and ('may refuse' in str(rivals)) == reversed_
    cert = certify(found, p.model, n_draws=20, n_causal=5)
    assert [r.rule for r in cert.fatal] == ['random'] * reversed_


def test_sums_of_effects_are_compared_with_the_circuit():
    circuit = np.array([True, True, False, False])
    random = np.array([[1, 0, 1, 0], [0, 0, 1, 1], [1, 0, 0, 1]], dtype=bool)
    found = compare_sums(circuit, random, np.array([0.5, -0.2, 0.1, -0.3]))
    assert (found.reach, found.n, found.likely) == (1, 3, True) and abs(found.shared - 1 / 3) < 1e-9
    assert not compare_sums(circuit, random[:0], np.ones(4)).likely


def test_find_says_why_not():
    "A task that the model cannot do: no head is named, and find gives the reason that the certificate gives."
    p = plant('chain', 1, n=30)
    found = find_circuit(p.model, Task('broken', BROKEN['cannot'](p.task.examples)), n_epochs=5, d_sae=50)
    assert not len(found.circuit) and 'no behaviour to explain' in found.confirmation.summary()
    cert = certify(found, p.model)
    assert cert.fatal[0].message in preview(found, p.model)


def test_heads_without_effect_are_refused(found, planted):
    unused = [h for h in all_heads(4, 10) if h not in planted.jobs][:3]
    wrong = [h for h in found.circuit if h not in planted.truth][:3]
    cert = certify(found, planted.model, unused + wrong, stop=False, **QUICK)
    assert {'causal', 'random'} <= set(rules(cert.fatal))
    assert all(r.advice for r in cert.fatal)


def test_no_head_and_every_head(found, planted):
    for heads, rule in ([], 'empty'), (all_heads(4, 10), 'whole'):
        cert = certify(found, planted.model, heads, stop=False, **QUICK)
        assert rules(cert.fatal) == [rule] and cert.not_run == ['stability', 'causes']
        assert cert.to_markdown() and cert._repr_html_()


def test_shuffled_codes_are_chance(by_codes, planted):
    "Codes without information about the labels: no head differs from chance, and the expensive stages are not run."
    codes, kept = by_codes.codes, by_codes.codes.values
    try:
        codes.values = np.random.default_rng(0).integers(0, 5, kept.shape)
        cert = certify(by_codes, planted.model, **QUICK)
    finally:
        codes.values = kept
    assert rules(cert.fatal) == ['chance'] and cert.not_run == ['codes', 'stability', 'causes']


def test_input_that_a_stage_cannot_use_is_a_reason(found, planted):
    audit = Audit(found, planted.model)
    audit.patched = Task('unanswered', [e._replace(answer=(), wrong=()) for e in planted.task.examples[:4]])
    assert rules(audit.run('causes')) == ['causes'] and audit.fatal


def test_the_model_is_loaded_by_its_name(found, planted, monkeypatch):
    asked = []
    monkeypatch.setattr('circuit_sae.trust.audit.load_model', lambda name: asked.append(name) or planted.model)
    assert Audit(found).model is planted.model and asked == [found.acts.made_from['model']['name']]


def test_save_and_load(good, tmp_path):
    files = good.save(tmp_path / 'new')
    assert [f.name for f in files] == ['certificate.json', 'certificate.md', 'certificate.html']
    assert set(files) == set((tmp_path / 'new').iterdir())
    assert load_certificate(files[0]) == load_certificate(tmp_path / 'new') == good
    d = json.loads(files[0].read_text(), parse_constant=lambda x: pytest.fail(f'{x} is not JSON'))
    assert d.pop('verdict') == 'Certified'
    assert Certificate(d).to_markdown() == good.to_markdown() == files[1].read_text()
    (tmp_path / 'other.json').write_text('{"heads": []}')
    with pytest.raises(InputError) as e:
        load_certificate(tmp_path / 'other.json')
    assert e.value.code == 'wrong-file'


def test_reasons_of_earlier_files_load(good):
    "A reason had no advice in files of earlier versions, and the record did not say whether codes chose the heads."
    record = {k: v for k, v in good.record.items() if k != 'by_codes'}
    record['reasons'] = [dict(rule='few', message='too few.', fatal=True)]
    cert = Certificate(record)
    assert rules(cert.fatal) == ['few'] and '1. **few**: too few.\n' in cert.to_markdown()


def test_a_failed_save_leaves_no_file(good, tmp_path, monkeypatch):
    monkeypatch.setattr('circuit_sae.trust.certificate._picture', lambda c: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        good.to_html(tmp_path / 'page.html')
    assert not list(tmp_path.iterdir())


def page_of(cert, tmp_path):
    "The HTML page, and its tree if it is well-formed."
    html = cert.to_html(tmp_path / 'page.html').read_text()
    return html, ET.fromstring(html.partition('\n')[2])


def test_page_is_well_formed_and_has_no_external_files(good, tmp_path):
    html, tree = page_of(good, tmp_path)
    external = r'https?:|//[a-z]|<script|<link|@import|url\('
    assert not re.search(external, re.sub(r'base64,[^"]+', '', html))
    assert [e.get('src')[:22] for e in tree.iter('img')] == ['data:image/png;base64,']
    text = ' '.join(tree.itertext())
    assert good.summary in text
    assert all(r.message in text for r in good.reasons) and all(h['head'] in text for h in good.heads)


def test_page_escapes_its_input(tmp_path):
    p = plant('chain', 1, n=12)
    task = Task('<script>alert(1)</script> | & "x"', p.task.examples)
    cert = certify(find_circuit(p.model, task, n_train=6, n_epochs=5, d_sae=50, top_k=3), p.model)
    html, tree = page_of(cert, tmp_path)
    assert '<script' not in html + cert._repr_html_() and task.name in tree.find('.//h1').text
    rows = [row for row in cert.to_markdown().splitlines() if row.startswith('| task')]
    assert rows and all(row.count('|') - row.count('\\|') == 3 for row in rows)


def test_page_in_a_browser(browser, good, tmp_path):
    file = good.to_html(tmp_path / 'page.html')
    browser.open(file, offline=True).one('main.certificate.ok')
    assert browser('document.images[0].naturalWidth') > 300
    assert browser('document.documentElement.scrollWidth <= innerWidth')
    other = [r for r in browser.requests() if r != file.resolve().as_uri() and not r.startswith('data:')]
    assert (browser.messages(), other) == ([], [])


@pytest.mark.parametrize(
    'settings, code',
    [
        (dict(n_random=19), 'too-small'),
        (dict(n_causal=1), 'too-small'),
        (dict(ablation='zeros'), 'unknown-name'),
        (dict(n_draw=5), 'unknown-name'),
        (dict(circuit=['L9H9']), 'no-such-head'),
        (dict(fdr=0), None),
    ],
)
def test_wrong_arguments(found, planted, settings, code):
    with pytest.raises(InputError) as e:
        certify(found, planted.model, **settings)
    assert code in (None, e.value.code)


def test_wrong_circuit_or_model(found, planted):
    for arguments, code in (
        ((found, plant('chain', 0).model), 'other-model'),
        ((found.circuit, planted.model), 'not-found'),
    ):
        with pytest.raises(InputError) as e:
            certify(*arguments)
        assert e.value.code == code


def command(tmp_path, task, capsys, *more):
    "Exit status, printed text, and the certificate, of a task on a random model of two layers."
    out = tmp_path / 'out'
    status = main(['certify', str(task), '--model', str(tmp_path / 'model'), '--out', str(out), *more])
    cert = load_certificate(out) if (out / 'certificate.json').exists() else None
    return status, capsys.readouterr(), cert


@pytest.fixture
def model_folder(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    from circuit_sae.models.load import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=4, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / 'model')
    tokenizer.save_pretrained(tmp_path / 'model')
    return tmp_path


def test_command_refuses_with_status_3(model_folder, capsys):
    given = ('--n', '20', '--n_train', '4', '--preset', 'quick')
    status, said, cert = command(model_folder, 'ioi', capsys, *given)
    assert status == 3 and not cert and '# Not certified' in said.out and cert.settings['fdr'] == 0.05
    written = sorted(f.name for f in (model_folder / 'out').glob('certificate.*'))
    assert written == ['certificate.html', 'certificate.json', 'certificate.md']
    status, _, again = command(model_folder, 'ioi', capsys)  # reads the circuit in the folder, and its number of pairs
    assert status == 3 and again.run == cert.run and again.finding['activations'] is None
    status, said, _ = command(model_folder, 'ioi', capsys, '--preset', 'paper')
    assert status == 2 and 'preset' in said.err


def test_command_refuses_six_prompts(model_folder, capsys):
    "Too few training examples are not an error here: the certificate gives the reason."
    status, _, cert = command(model_folder, 'ioi', capsys, '--n', '3')
    assert (status, cert.fatal[0].rule) == (3, 'few')


def test_command_certifies_with_status_0(good, found, planted, tmp_path, capsys, monkeypatch, model_folder):
    monkeypatch.setattr('circuit_sae.commands._found', lambda *_: (planted.model, found))
    monkeypatch.setattr('circuit_sae.trust.certificate.certify', lambda *_, **kw: good)
    status, said, cert = command(tmp_path, 'ioi', capsys, '--n', '4')
    assert status == 0 and cert == good and '# Certified' in said.out, said.err
