"""python .ci/readme.py: write README.md from nbs/index.ipynb.

Markdown cells are copied, with links changed to start at the root of the repository. Code cells become ```python
blocks and their text outputs indented blocks. The directives `hide`, `include: false`, `echo: false` and
`output: false` work as on the site. README.md cannot show a picture that a cell draws: save it in nbs/images and link
it in a Markdown cell.
"""

import json
import os
import re
import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
note = '<!-- Made from nbs/index.ipynb by .ci/readme.py: edit the notebook, not this file. -->'


def from_the_top(md, folder):
    "Turn links that name a file relative to `folder` so that they start from the top of the repository."

    def turn(m):
        file, hash_, anchor = m[2].partition('#')
        if not file or ':' in file or file[0] == '/' or not (root / folder / file).exists():
            return m[0]
        return m[1] + Path(os.path.normpath(f'{folder}/{file}')).as_posix() + hash_ + anchor + m[3]

    return re.sub(r"""(\]\(|(?:src|href)=")([^)"\s]+)([)"\s])""", turn, md)


def text_of(output):
    "The text of one output, or nothing for what only a notebook can show."
    if output['output_type'] == 'stream':
        return ''.join(output['text']) if output['name'] == 'stdout' else ''
    data = output.get('data', {})
    if any(k.startswith('image/') for k in data):
        sys.exit(
            'nbs/index.ipynb: a cell draws a picture, which README.md cannot show. '
            'Save it in nbs/images and name it in a Markdown cell, or mark the cell `#| hide`.'
        )
    if any('widget-view' in k for k in data):
        return ''
    return ''.join(data.get('text/markdown') or data.get('text/plain', ''))


def block(output):
    "One output as Markdown: Markdown as it is, text indented."
    text = re.sub(r'\x1b\[[0-9;]*m', '', text_of(output)).rstrip()
    if 'text/markdown' in output.get('data', {}):
        return text.strip()
    return '\n'.join(f'    {line}'.rstrip() for line in text.split('\n')) if text else ''


def cell_md(cell, folder):
    "One cell as a list of Markdown blocks."
    source = ''.join(cell['source']).strip()
    if cell['cell_type'] == 'markdown':
        return [from_the_top(source, folder)]
    if cell['cell_type'] != 'code':
        return []
    flags = {re.sub(r'\s', '', m).lower() for m in re.findall(r'^#\|(.*)$', source, flags=re.M)}
    source = re.sub(r'^#\|.*\n?', '', source, flags=re.M).strip()
    if not source or flags & {'hide', 'include:false'}:
        return []
    shown = [] if flags & {'echo:false', 'hide_input'} else [f'```python\n{source}\n```']
    return shown + ([] if flags & {'output:false', 'hide_output'} else [block(o) for o in cell['outputs']])


def readme(nb=root / 'nbs/index.ipynb'):
    "The text of README.md."
    folder = Path(nb).parent.relative_to(root).as_posix()
    blocks = [b for c in json.loads(Path(nb).read_text(encoding='utf-8'))['cells'] for b in cell_md(c, folder) if b]
    return '\n\n'.join([note, *blocks]) + '\n'


if __name__ == '__main__':
    (root / 'README.md').write_text(readme(), encoding='utf-8')
