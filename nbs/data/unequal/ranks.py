"""Rank the heads of SmolLM2-135M on the indirect-object task in its equal and its unequal form.

    python ranks.py    writes ranks.csv; about ten minutes on two cores

A draw has 60 pairs. `equal_1` and `equal_2` are two draws with names of one token. The other columns have the sentences
of one of the two draws and another giver in the negative: a name of one token (`other_names`), a name of two tokens
(`two_tokens_1`, `two_tokens_2`), or the same name with a word in front (`one_word_more`). Positives stay the same.
"""

import random
from pathlib import Path

import pandas as pd

from circuit_sae.core import all_heads
from circuit_sae.data.tasks import Task
from circuit_sae.models.load import load_model
from circuit_sae.score.attribution import attribute_heads

ONE = """Mary John Tom James Dan Sid Martin Amy Mark Simon Paul Kate Alice Peter David Sarah Anna Laura Steve Bob
    Frank George Henry Emma Lucy Jack Adam Ryan Kevin Brian""".split()
TWO = 'Avery Tracy Rowena Percival Beatriz Octavia Quentin Tobias Zelda Clementine Barnaby Marisol Ignatius'.split()
SENTENCES = [
    'When {a} and {b} went to the {place}, {giver} gave a {thing} to',
    'Then {a} and {b} had a long talk at the {place}, and {giver} handed a {thing} to',
    'While {a} and {b} were at the {place}, {giver} offered a {thing} to',
    'After {a} and {b} came back from the {place}, {giver} passed a {thing} to',
]
PLACES = 'store school park office market station library garden'.split()
THINGS = 'book drink ring basket letter ball apple key'.split()
DRAWS = dict(
    equal_1=(1, ONE),
    equal_2=(2, ONE),
    other_names=(1, ONE[::-1]),
    two_tokens_1=(1, TWO),
    two_tokens_2=(2, TWO),
    one_word_more=(1, ONE, 'old '),
)


def draw(seed, givers, before='', n=60):
    "Return a task of `n` pairs; the giver of each negative is one of `givers`, with the text `before` in front."
    rng = random.Random(seed)
    rows = []
    while len(rows) < n:
        a, b = rng.sample(ONE, 2)
        swapped = rng.random() >= 0.5
        sentence = rng.choice(SENTENCES)
        if swapped:
            sentence = sentence.replace('{a} and {b}', '{b} and {a}')
        words = dict(a=a, b=b, place=rng.choice(PLACES), thing=rng.choice(THINGS))
        giver = random.Random(f'{seed}-{len(rows)}').choice([name for name in givers if name not in (a, b)])
        positive, negative = (sentence.format(giver=name, **words) for name in (b, before + giver))
        rows.append(dict(positive=positive, negative=negative, answer=f' {a}', wrong=f' {b}'))
    return Task.from_data(rows, 'ioi')


def main():
    model = load_model('smollm2-135m')
    columns = {name: attribute_heads(model, draw(*given), temperature=2.0).signed for name, given in DRAWS.items()}
    heads = map(str, all_heads(model.cfg.n_layers, model.cfg.n_heads))
    table = pd.DataFrame(columns, index=pd.Index(heads, name='head')).round(6)
    table.to_csv(Path(__file__).parent / 'ranks.csv')


if __name__ == '__main__':
    main()
