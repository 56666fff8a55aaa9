"""Every link in the documents and the notebooks leads to an existing file and heading; tests/test_site.py checks the site"""
import ast
import json
import re
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parent.parent
NBS,PKG = ROOT/'nbs',ROOT/'fastai_bnstats'
REPO,SITE = (re.search(rf'^{k} = "(.+)"', (ROOT/'pyproject.toml').read_text(), re.M)[1] for k in ('Repository','Documentation'))
RAW = REPO.replace('github.com', 'raw.githubusercontent.com')
NOTEBOOKS = sorted(p for p in NBS.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
DOCS = [ROOT/'README.md', ROOT/'CONTRIBUTING.md', ROOT/'CHANGELOG.md', *NOTEBOOKS]


def shown(path):
    return str(path.relative_to(ROOT))


@lru_cache(maxsize=None)
def prose(path):
    "The text of a document without code; for notebooks, Markdown cells and outputs in Markdown or HTML"
    if path.suffix == '.ipynb':
        cells = json.loads(path.read_text())['cells']
        texts = [''.join(c['source']) for c in cells if c['cell_type'] == 'markdown']
        outs = [o.get('data', {}) for c in cells for o in c.get('outputs', [])]
        texts += [''.join(o[k]) for o in outs for k in ('text/markdown', 'text/html') if k in o]
    else: texts = [path.read_text()]
    return '\n\n'.join(re.sub(r'^(```|~~~).*?^\1|<(style|script)\b.*?</\2>', '', t, flags=re.S|re.M) for t in texts)


def links(path):
    text = re.sub(r'`[^`\n]+`(?!\])', '', prose(path))
    found = re.findall(r'\]\(<?([^)\s>]+)|\b(?:href|src)="([^"]+)"', text)
    return list(dict.fromkeys(a or b for a,b in found))


def slug(heading):
    "The anchor that GitHub and pandoc give a heading"
    return re.sub(r'[^\w\s.-]', '', re.sub(r'\{.*\}|[`*\\]', '', heading)).strip().lower().replace(' ', '-')


@lru_cache(maxsize=None)
def anchors(path):
    text = prose(path)
    return {slug(h) for h in re.findall(r'^ {0,3}#{1,6} +(.+?) *#*$', text, re.M)} | set(re.findall(r'\bid="?([\w.-]+)|\{#([\w.-]+)', text))


def page_name(nb):
    "The page that a notebook becomes, such as record/callback.html"
    return nb.relative_to(NBS).with_name(re.sub(r'^\d+[a-zA-Z0-9]*_', '', nb.name.lower())).with_suffix('.html').as_posix()


def fault(page, link, inside=ROOT):
    "Why a link of a page is broken, or '' if it is not"
    url,_,anchor = unquote(link).partition('#')
    for prefix in (f'{REPO}/blob/main/', f'{RAW}/main/'):
        if url.startswith(prefix):
            file,line = ROOT/url.removeprefix(prefix),re.fullmatch(r'L(\d+)', anchor)
            if not file.is_file(): return f'{link}: no file {file}'
            return f'{link}: the file is shorter' if line and int(line[1]) > len(file.read_text().splitlines()) else ''
    if url.startswith(SITE):
        name = url.removeprefix(SITE).lstrip('/').removesuffix('.md') or 'index.html'
        return '' if name in map(page_name, NOTEBOOKS) else f'{link}: no notebook becomes this page'
    if re.match(r'[a-z]+:', url): return '' # another site, or data in the page itself
    target = (page.parent/url).resolve() if url else page
    if not target.exists(): return f'{link}: no file {target}'
    if not target.is_relative_to(inside): return f'{link}: leads out of {inside.name}; readers of this page have no other files'
    return f'{link}: no such heading' if anchor and anchor not in anchors(target) else ''


def faults(page, inside=ROOT):
    return [f for link in links(page) if (f:=fault(page, link, inside))]


@pytest.mark.parametrize('page', DOCS, ids=shown)
def test_links_of_a_document(page):
    assert not faults(page, NBS if page.is_relative_to(NBS) else ROOT)


def test_a_broken_link_is_found(tmp_path):
    (tmp_path/'b.md').write_text('# One `two`\n')
    page = tmp_path/'a.md'
    page.write_text(f"""[a](b.md) [b](b.md#one-two) [c](gone.md) [d](b.md#three) ![e](no.png)
<img src="f.png"> `[g](gone.md)` [`h`](../up.md)
```
[i](gone.md)
```
[j]({SITE}/gone.html) [k]({RAW}/main/gone.png) [l]({REPO}/blob/main/README.md#L9999) [m]({SITE}) [n](https://docs.fast.ai/gone)""")
    (tmp_path.parent/'up.md').write_text('')
    found = {f.partition(': ')[0].rpartition('/')[2] for f in faults(page, tmp_path)}
    assert found == {'gone.md', 'b.md#three', 'no.png', 'f.png', 'up.md', 'gone.html', 'gone.png', 'README.md#L9999'}


EXPORTED = [p for p in sorted(PKG.rglob('*.py')) if 'File to edit' in p.read_text()[:2000]]


@pytest.mark.parametrize('module', EXPORTED, ids=shown)
def test_docs_link_of_a_module(module):
    name = module.relative_to(PKG).with_suffix('').as_posix()
    assert f'Docs: {SITE}/{name}.html.md' in ast.get_docstring(ast.parse(module.read_text()))
    assert any(page_name(nb) == f'{name}.html' for nb in NOTEBOOKS)
