"The certificate: broken tasks are refused for their own reason, the page is whole and needs nothing else, and the command says it by its exit status."
import json, re, xml.etree.ElementTree as ET
import numpy as np, pytest
from circuit_sae.trust.audit import STAGES, Audit, Reason, pairs_needed, prompts_sha256
from circuit_sae.trust.certificate import Certificate, certify, load_certificate
from circuit_sae.cli import main
from circuit_sae.core import InputError, all_heads
from circuit_sae.find import find_circuit
from circuit_sae.models.load import load_model
from circuit_sae.truth.planted import plant
from circuit_sae.data.prompts import ioi_task
from circuit_sae.data.tasks import Task

BROKEN = dict(cannot=lambda exs: [e._replace(answer=e.wrong, wrong=e.answer) for e in exs],
              same=lambda exs: [e._replace(negative=e.positive) for e in exs],
              few=lambda exs: exs[:3])
QUICK = dict(n_draws=20, seeds=range(2), n_causal=5)

@pytest.fixture(scope='module')
def planted(): return plant('induction', 0, 4, 10, n=60)

@pytest.fixture(scope='module')
def found(planted): return find_circuit(planted.model, planted.task, preset='quick', fdr=.05, d_sae=100)

@pytest.fixture(scope='module')
def good(found, planted): return certify(found, planted.model, circuit=planted.truth, truth=planted.truth)

def check_refused(model, examples, rule, **kw):
    cert = certify(find_circuit(model, Task('broken', examples), n_train=6, n_epochs=5, **kw), model)
    assert not cert and not cert.ok and [r.rule for r in cert.fatal] == [rule] # its own reason, and no other
    assert cert.not_run == [k for k in STAGES if k != 'behaviour'] and cert.seconds['behaviour'] < 5
    text = cert.to_markdown()
    assert text.startswith('# Not to be believed') and text.index(f'1. **{rule}**') < text.index('## ')
    return cert

def test_broken_tasks_in_a_real_model():
    "Swapped answers, negatives that equal the positives, six prompts."
    model = load_model('smollm2-135m')
    for rule, make in BROKEN.items(): check_refused(model, make(ioi_task(n=14).bind(model).examples), rule, top_k=8)

@pytest.mark.parametrize('rule', BROKEN)
@pytest.mark.parametrize('family', ['lookup', 'chain'])
def test_broken_planted_task(family, rule):
    p = plant(family, 1, n=30)
    check_refused(p.model, BROKEN[rule](p.task.examples), rule, d_sae=50)

def test_reasons_help():
    p = plant('chain', 1, n=30)
    says = {rule: check_refused(p.model, make(p.task.examples), rule, d_sae=50).fatal[0].message for rule, make in BROKEN.items()}
    assert 'swapped?' in says['cannot'] and 'Make the negatives different' in says['same'] and 'at least 9 pairs' in says['few']

def test_pairs_needed_is_where_a_head_can_first_stand_out():
    for H in (24, 144, 270, 1200):
        for fdr in (.2, .05, .01): assert H*2.**-pairs_needed(H, fdr) <= fdr < H*2.**(1 - pairs_needed(H, fdr))

def test_copies_of_a_pair_count_once():
    p = plant('chain', 1, n=30)
    check_refused(p.model, p.task.examples[:5]*6, 'few', d_sae=50)

def test_the_true_circuit_is_certified(good, planted):
    assert good and good.verdict == 'Certified' and not good.not_run
    assert [h['head'] for h in good.heads if h['in_circuit']] == good.circuit['heads'] and {*good.circuit['heads']} == {str(h) for h in planted.truth}
    assert all(h['effect'] > .3 for h in good.heads if h['true']) and good.causes['faithfulness'] > .9 and abs(good.causes['left']) < .1
    assert good.hashes['prompts_sha256'] == prompts_sha256(planted.task, planted.model)

def test_heads_without_effect_are_refused(found, planted):
    idle = [h for h in all_heads(4, 10) if h not in planted.jobs][:3] + [h for h in found.circuit if h not in planted.truth][:3]
    cert = certify(found, planted.model, idle, stop=False, **QUICK)
    assert {'causal', 'random'} <= {r.rule for r in cert.fatal}

def test_no_head_and_every_head(found, planted):
    for heads, rule in ([], 'empty'), (all_heads(4, 10), 'whole'):
        cert = certify(found, planted.model, heads, stop=False, **QUICK)
        assert [r.rule for r in cert.fatal] == [rule] and cert.not_run == ['stability', 'causes']
        cert.to_markdown(), cert._repr_html_()

def test_shuffled_labels_are_chance(planted):
    "Codes that know nothing of the labels: no head is told from chance, and the dear stages are not run."
    by_codes = find_circuit(planted.model, planted.task, score='unique codes', fdr=.05, d_sae=100)
    codes, kept = by_codes.codes, by_codes.codes.values
    try:
        codes.values = np.random.default_rng(0).integers(0, 5, kept.shape)
        cert = certify(by_codes, planted.model, **QUICK)
    finally: codes.values = kept
    assert [r.rule for r in cert.fatal] == ['chance'] and cert.not_run == ['codes', 'stability', 'causes']

def test_what_a_stage_cannot_do_is_a_reason(found, planted):
    a = Audit(found, planted.model)
    a.patched_task = Task('uneven', [e._replace(negative=e.negative + ' ' + e.negative.split()[0]) for e in planted.task.examples[:4]], equal_length=False)
    assert [r.rule for r in a.run('causes')] == ['causes'] and a.fatal

def test_saved_and_read_back(good, tmp_path):
    files = good.save(tmp_path/'new')
    assert [f.name for f in files] == ['certificate.json', 'certificate.md', 'certificate.html'] == [f.name for f in sorted((tmp_path/'new').iterdir(), key=files.index)]
    assert load_certificate(files[0]) == load_certificate(tmp_path/'new') == good
    d = json.loads(files[0].read_text(), parse_constant=lambda x: pytest.fail(f'{x} is no JSON'))
    assert d['verdict'] == 'Certified' and Certificate({k: v for k, v in d.items() if k != 'verdict'}).to_markdown() == good.to_markdown() == files[1].read_text()
    (tmp_path/'other.json').write_text('{"heads": []}')
    with pytest.raises(InputError, match='no certificate'): load_certificate(tmp_path/'other.json')

def test_a_failed_save_leaves_no_file(good, tmp_path, monkeypatch):
    monkeypatch.setattr('circuit_sae.trust.certificate._picture', lambda c: 1/0)
    with pytest.raises(ZeroDivisionError): good.to_html(tmp_path/'page.html')
    assert not list(tmp_path.iterdir())

def page_of(cert, tmp_path):
    html = cert.to_html(tmp_path/'page.html').read_text()
    return html, ET.fromstring(html.partition('\n')[2]) # well-formed, or an error

def test_page_is_well_formed_and_needs_nothing_else(good, tmp_path):
    html, tree = page_of(good, tmp_path)
    assert not re.search(r'https?:|//[a-z]|<script|<link|@import|url\(', re.sub(r'base64,[^"]+', '', html))
    assert [e.get('src')[:22] for e in tree.iter('img')] == ['data:image/png;base64,']
    text = ' '.join(tree.itertext())
    assert all(r.message in text for r in good.reasons) and all(h['head'] in text for h in good.heads)

def test_page_escapes_what_it_is_given(tmp_path):
    p = plant('chain', 1, n=12)
    task = Task('<script>alert(1)</script> | & "x"', p.task.examples)
    cert = certify(find_circuit(p.model, task, n_train=6, n_epochs=5, d_sae=50, top_k=3), p.model)
    html, tree = page_of(cert, tmp_path)
    assert '<script' not in html + cert._repr_html_() and task.name in tree.find('.//h1').text
    assert all(row.count('|') - row.count('\\|') == 3 for row in cert.to_markdown().splitlines() if row.startswith('| task'))

def test_page_in_a_browser(browser, good, tmp_path):
    file = good.to_html(tmp_path/'page.html')
    browser.open(file, offline=True).one('main.certificate.ok')
    assert browser('document.images[0].naturalWidth') > 300 and browser('document.documentElement.scrollWidth <= innerWidth')
    assert (browser.messages(), [r for r in browser.requests() if r != file.resolve().as_uri() and not r.startswith('data:')]) == ([], [])

def test_wrong_arguments(found, planted):
    for kw, says in ((dict(n_random=19), 'n_random'), (dict(fdr=0), 'between 0 and 1'), (dict(ablation='zeros'), "'zero'"), (dict(n_causal=1), 'n_causal'), (dict(circuit=['L9H9']), 'L9H9')):
        with pytest.raises(InputError, match=says): certify(found, planted.model, **kw)
    with pytest.raises(InputError, match='another model'): certify(found, plant('chain', 0).model)
    with pytest.raises(InputError, match='needs the activations'): certify(found.circuit, planted.model)

def command(tmp_path, task, capsys, *more):
    "Exit status, what was printed, and the certificate, of a task on a random model of two layers."
    status = main(['certify', str(task), '--model', str(tmp_path/'model'), '--out', str(tmp_path/'out'), *more])
    return status, capsys.readouterr(), load_certificate(tmp_path/'out') if (tmp_path/'out/certificate.json').exists() else None

@pytest.fixture
def model_folder(tmp_path):
    from circuit_sae.models.load import tiny_tokenizer
    from transformers import GPT2Config, GPT2LMHeadModel
    tokenizer = tiny_tokenizer()
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=4, n_positions=64)).save_pretrained(tmp_path/'model')
    tokenizer.save_pretrained(tmp_path/'model')
    return tmp_path

def test_command_refuses_with_status_3(model_folder, capsys):
    status, said, cert = command(model_folder, 'ioi', capsys, '--n', '20', '--n_train', '4', '--preset', 'quick')
    assert status == 3 and not cert and '# Not to be believed' in said.out and cert.settings['fdr'] == .05
    assert sorted(f.name for f in (model_folder/'out').glob('certificate.*')) == ['certificate.html', 'certificate.json', 'certificate.md']
    status, _, again = command(model_folder, 'ioi', capsys, '--n', '20') # the circuit that lies there
    assert status == 3 and again.run == cert.run and again.finding['SAE'] is None
    status, said, _ = command(model_folder, 'ioi', capsys, '--n', '20', '--preset', 'paper')
    assert status == 2 and 'found with preset' in said.err

def test_command_says_few_of_six_prompts(model_folder, capsys):
    status, _, cert = command(model_folder, 'ioi', capsys, '--n', '3')
    assert (status, cert.fatal[0].rule) == (3, 'few') # not an error for want of training examples

def test_command_certifies_with_status_0(good, found, planted, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('circuit_sae.cli._found', lambda *_: (planted.model, found))
    monkeypatch.setattr('circuit_sae.trust.certificate.certify', lambda *_, **kw: good)
    status, said, cert = command(tmp_path, 'ioi', capsys, '--n', '4')
    assert status == 0 and cert == good and '# Certified' in said.out
