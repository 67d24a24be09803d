"Features: sites of several architectures, training that continues, and figures that agree with runs written out."

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import Gemma2Config, GPT2Config, GPTNeoXConfig, GraniteConfig

from circuit_sae.bench.counting import CountingDevice
from circuit_sae.codes.sae import DiscreteSAE, head_scales
from circuit_sae.core import InputError
from circuit_sae.data.batches import bind_task
from circuit_sae.data.prompts import ioi_task, tiny_tokenizer
from circuit_sae.features.dictionary import Dictionary, SparseDictionary, fit_basis, position_codes
from circuit_sae.features.sites import all_sites, edited, position_logits, read_sites
from circuit_sae.features.token_acts import model_documents, task_documents, token_acts
from circuit_sae.features.training import TrainingStopped, evaluate_dictionary, train_dictionary
from circuit_sae.models.forward import run
from circuit_sae.models.load import save_random_model, tiny_model
from circuit_sae.models.rerun import run_edited

D_VOCAB = len(tiny_tokenizer())
SMALL = dict(vocab_size=D_VOCAB, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)
CONFIGS = {
    'gpt2': GPT2Config(vocab_size=D_VOCAB, n_embd=24, n_layer=2, n_head=4, n_positions=64),
    'neox': GPTNeoXConfig(**SMALL, max_position_embeddings=64),
    'gemma2': Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8),
    'granite': GraniteConfig(**SMALL, num_key_value_heads=2, residual_multiplier=0.5),
}
IDS = np.random.default_rng(0).integers(0, D_VOCAB, (2, 7))


@pytest.fixture(scope='module', params=CONFIGS)
def model(request, tmp_path_factory):
    "Return a random model of each architecture."
    return save_random_model(CONFIGS[request.param], tmp_path_factory.mktemp(request.param))


def test_every_site_is_read_and_replaced(model):
    "An edit that changes nothing keeps the logits; zeros in place of any site move them."
    clean = run(model, IDS)
    sites = all_sites(model)
    assert len(sites) == 2 * (4 + 1 + 4 + 4)
    assert set(read_sites(model, IDS, sites)) == set(sites)
    with edited(model, dict.fromkeys(sites, torch.clone)):
        torch.testing.assert_close(run(model, IDS), clean, atol=1e-4, rtol=1e-4)
    for site in sites:
        with edited(model, {site: torch.zeros_like}):
            assert (run(model, IDS) - clean).abs().max() > 1e-6, site


def test_attention_and_results_of_heads(model):
    "The results of heads sum to what attention adds, and removing one is removing its `z`."
    at = {str(site): x for site, x in read_sites(model, IDS, all_sites(model)).items()}
    rest = at['L1 attn_out'] - sum(at[f'L1H{h} result'] for h in range(4))
    torch.testing.assert_close(rest, rest[:1, :1].expand_as(rest), atol=1e-4, rtol=1e-3)  # a bias
    if hasattr(model.blocks[0], 'ln1_post'):
        return  # a norm behind the sum: a `result` keeps its scale, as the page says
    keep = (torch.arange(4) != 2)[:, None]
    expected = run_edited(model, IDS, lambda layer, z: z * keep if layer == 1 else None)
    for site in ('L1H2 z', 'L1H2 result'):
        with edited(model, {site: torch.zeros_like}):
            torch.testing.assert_close(run(model, IDS), expected, atol=1e-3, rtol=1e-3)


def test_edits_in_half_precision(tmp_path):
    "Functions get float32 in a model of half precision too."
    model = save_random_model(CONFIGS['gpt2'], tmp_path, dtype='bfloat16')
    for site in ('L0.attn_out', 'L0.z', 'L0H1', 'L0H1 result'):
        with edited(model, {site: lambda x: F.linear(x, torch.eye(x.shape[-1]))}):
            assert torch.isfinite(run(model, IDS)).all()


def test_loss_recovered_agrees_with_runs_written_out():
    model = tiny_model()
    documents = model_documents(model, 6, context=12)
    documents.ids[3] = documents.ids[3][:7]  # padded in a batch
    basis = fit_basis(token_acts(model, documents, 'L0.attn_out'), 'pca', 4)
    scores = evaluate_dictionary(model, basis, documents, batch_size=4)
    for i, ids in enumerate(documents.ids):
        for column, edit in enumerate([lambda x: x, lambda x: basis(x)[0], torch.zeros_like]):

            def change(x, edit=edit):
                return torch.cat([x[:, :1], edit(x[:, 1:])], 1)

            with torch.no_grad(), edited(model, {'L0.attn_out': change}):
                logits = position_logits(model, [ids])[0]
            loss = F.cross_entropy(logits[1:-1], torch.tensor(ids[2:]), reduction='sum')
            assert scores.losses[i, column] == pytest.approx(loss.item(), rel=1e-4)
    plain, rebuilt, zeros = scores.losses.sum(0)
    assert scores.loss_recovered == pytest.approx((zeros - rebuilt) / (zeros - plain))
    assert scores.n_tokens == sum(len(ids) - 2 for ids in documents.ids)


@pytest.mark.parametrize('kind', ['topk', 'batchtopk', 'jumprelu', 'relu', 'cunningham'])
def test_a_training_continues_bit_for_bit(kind, tmp_path):
    x = torch.randn(600, 6, generator=torch.Generator().manual_seed(1))
    settings = dict(kind=kind, width=12, k=2, steps=40, batch=64, every=7, dead_after=100)
    whole = train_dictionary(x, **settings)
    for until in (9, 25, None):
        part = train_dictionary(x, **settings, checkpoint=tmp_path / 'state.pt', until=until)
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, part.state_dict()[name]), name
    history = [{line['step']: line for line in d.made_from['history']} for d in (whole, part)]
    assert all(history[1][step] == line for step, line in history[0].items())


def test_a_training_that_diverges_keeps_its_last_state(tmp_path):
    x = torch.randn(600, 6, generator=torch.Generator().manual_seed(1))
    x[77] = 3e38
    settings = dict(width=12, k=2, steps=40, batch=64, every=3, normalise=False)
    with pytest.raises(TrainingStopped) as stopped:
        train_dictionary(x, **settings, checkpoint=tmp_path / 'state.pt')
    error = stopped.value
    assert error.code == 'diverged' and error.good_step < error.step
    kept = train_dictionary(x, **settings, checkpoint=tmp_path / 'state.pt', until=1) if error.good_step else None
    for name, weight in error.dictionary.state_dict().items():
        assert torch.isfinite(weight).all()
        assert kept is None or torch.equal(weight, kept.state_dict()[name])


def test_codes_at_positions_are_those_of_the_sae():
    "Codes of every head at every position agree with encoding what the head writes there."
    model = tiny_model()
    bound = bind_task(model, ioi_task(n=3))
    sae = DiscreteSAE(32, 40, seed=3)
    sae.scale = torch.rand(8, generator=torch.Generator().manual_seed(0)) + 0.5
    everywhere = position_codes(bound, sae, pool='all', batch_size=2)
    strongest = position_codes(bound, sae)
    last = position_codes(bound, sae, pool='last')
    for row, ids in enumerate(bound.tokens.ids):
        for head in range(8):
            site = f'L{head // 4}H{head % 4} result'
            (x,) = read_sites(model, [ids], site).values()
            a = sae.encode(x[0] / head_scales(sae, 2, 4).flatten()[head])
            assert everywhere[row][:, head].tolist() == torch.where(a.amax(1) > 0, a.argmax(1), -1).tolist()
            assert strongest.values[row, head] == a.amax(0).argmax()
            assert last.values[row, head] == everywhere[row][-1, head]


def test_gradients_flow_through_a_dictionary():
    model = tiny_model()
    dictionary = SparseDictionary(32, 64, k=4, site='L0.attn_out').eval()
    shift = torch.zeros(64, requires_grad=True)
    with edited(model, {'L0.attn_out': lambda x: dictionary.decode(dictionary.encode(x) + shift)}):
        position_logits(model, IDS).logsumexp(-1).sum().backward()
    assert (shift.grad != 0).all()


def test_a_dictionary_of_another_model_is_refused(tmp_path):
    model = tiny_model()
    acts = token_acts(model, task_documents(model, ioi_task(n=4)), 'L1H2')
    fit_basis(acts, 'ica').save(tmp_path / 'a.safetensors')
    Dictionary.load(tmp_path / 'a.safetensors', model)
    with pytest.raises(InputError) as refused:
        Dictionary.load(tmp_path / 'a.safetensors', tiny_model(seed=2))
    assert refused.value.code == 'other-model'


def test_training_on_another_device_gives_the_same_dictionary():
    "On a device that refuses tensors of the CPU, activations, trainings and losses are those of the CPU."
    model = tiny_model()
    bound = bind_task(model, ioi_task(n=4))
    documents = task_documents(bound)
    settings = dict(width=48, k=4, steps=12, batch=32, dead_after=40, every=6)

    def everything(device):
        acts = token_acts(model, documents, 'L1 resid_pre')
        made = [train_dictionary(acts, kind, **settings, device=device) for kind in ('topk', 'cunningham', 'jumprelu')]
        made[0] = train_dictionary(acts, 'topk', **settings, device=device, held_out=acts, model=model)
        return acts.x, made, [evaluate_dictionary(model, d, documents) for d in made]

    x, dictionaries, scores = everything('cpu')
    with CountingDevice(model):
        x2, dictionaries2, scores2 = everything('counted')
    torch.testing.assert_close(x, x2, atol=1e-5, rtol=1e-5)
    for d, d2, s, s2 in zip(dictionaries, dictionaries2, scores, scores2):
        torch.testing.assert_close(d.directions, d2.directions, atol=1e-3, rtol=1e-3)
        np.testing.assert_allclose(s.losses, s2.losses, rtol=1e-3)
        assert s.explained_variance == pytest.approx(s2.explained_variance, abs=1e-3)


def test_copies_to_the_host_do_not_grow_with_documents_and_sites():
    model = tiny_model()
    copies = {}
    for n in (2, 6):
        documents = task_documents(bind_task(model, ioi_task(n=n)))
        with CountingDevice(model) as device:
            copies[n] = device.count(lambda d=documents: token_acts(model, d, 'L1 resid_pre'))[0].to_host
    assert copies[2] == copies[6] <= 4
