"""Join the tables of several processes: `python merge.py out.csv part1.csv part2.csv`.

A row that stands in several files, apart from its measured (decimal) figures and times, is taken from the last of them.
`out.csv` may be one of the parts.
"""

import argparse
from pathlib import Path

import pandas as pd

from circuit_sae.core import InputError, whole_file


def merge(tables, key):
    "Return all rows of some tables in one, sorted by the columns `key`; of equal keys the last row."
    for table in tables:
        missing = [name for name in key if name not in table]
        if missing:
            raise InputError(f'a file has no column {missing[0]!r}; it has {", ".join(table)}.', code='no-column')
    rows = pd.concat(tables).drop_duplicates(key, keep='last')
    return rows.sort_values(key, kind='stable')


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('out', type=Path)
    parser.add_argument('parts', nargs='+', type=Path)
    parser.add_argument('--key', nargs='+', help='columns that name a row; default: the known ones')
    given = parser.parse_args()
    tables = [pd.read_csv(path) for path in given.parts]
    known = ['model', 'case', 'family', 'method', 'score', 'null', 'task', 'seed', 'draw', 'given']
    known += ['pairs', 'judged', 'target']
    key = given.key or [name for name in known if name in tables[0]]
    with whole_file(given.out) as path:
        merge(tables, key).to_csv(path, index=False)
