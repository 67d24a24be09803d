"""Count operators and copies to the host of every stage on a model with 30 layers of 9 heads, on any machine.

python nbs/benchmarks/speed/counts.py    # about three minutes on two cores; writes counts-TASK.json
"""

import tempfile
from pathlib import Path

from transformers import LlamaConfig

from circuit_sae.bench.speed import speed
from circuit_sae.data.prompts import tiny_tokenizer
from circuit_sae.models.load import save_random_model

STAGES = ['work: activations', 'work: training', 'work: flow', 'work: find', 'work: patching']


def narrow_model():
    "Return a random model with the layers and heads of SmolLM2-135M; counts do not depend on its width."
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=144,
        intermediate_size=288,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    with tempfile.TemporaryDirectory() as folder:
        model = save_random_model(config, folder, noise=0, device='cpu')
    model.circuit_sae_name = 'random, 30 layers of 9 heads'
    return model


if __name__ == '__main__':
    model = narrow_model()
    for task in 'ioi', 'induction':
        print(speed(model, task, 40, STAGES, Path(__file__).with_name(f'counts-{task}.json')))
