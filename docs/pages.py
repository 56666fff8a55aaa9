"""Prepare the notebooks for Sphinx: `python docs/pages.py FOLDER` writes FOLDER/pages, and in FOLDER/extra each page as Markdown

nbdev processes the notebooks as for its own site, except for the reference.
"""
import re
import shutil
import sys
from collections import defaultdict
from pathlib import Path

from fastcore.nbio import mk_cell, new_nb, read_nb, write_nb
from nbdev.config import get_config, nbpath2html
from nbdev.processors import FilterDefaults, clean_show_doc, exec_show_docs

from reference import Reference

CFG = get_config()
NBS,SITE = CFG.nbs_path,CFG.doc_host+CFG.doc_baseurl
FIRST = 'guides', 'tutorials', 'claims', 'record', 'freeze', 'landscape', 'plot', 'compare', 'export', 'recording', 'measure', 'study'


def address(nb): return nbpath2html(nb.relative_to(NBS)).as_posix()


def sections():
    "The sections of the sidebar in reading order: caption, notebooks"
    found = defaultdict(list)
    for nb in sorted(NBS.rglob('[!._]*.ipynb')): found[nb.parent.relative_to(NBS).as_posix()].append(nb)
    found['.'].remove(NBS/'index.ipynb')
    yield '',[NBS/'index.ipynb']
    for name in (*FIRST, *sorted({*found}-{*FIRST, '.'}), '.'):
        caption = 'More' if name == '.' else f'Reference: {name}' if (CFG.lib_path/name).is_dir() else name.capitalize()
        if found[name]: yield caption,found[name]


class Procs(FilterDefaults):
    def base_procs(self): return [Reference if p is clean_show_doc else p for p in super().base_procs() if p is not exec_show_docs]


def read(nb):
    "Title, description and cells of a page; links to notebooks lead to the site"
    page = read_nb(nb)
    Procs()(page)
    title,description = (page.frontmatter_.get(k, '') for k in ('title', 'description'))
    cells = [mk_cell(f'# {title}\n\n{description}', 'markdown')]
    for c in page.cells:
        if c.cell_type == 'markdown' and not c.source.startswith('<!-- WARNING'):
            text = re.sub(r'\]\(([^):\s]+\.ipynb)', lambda m: f']({SITE}/{address((nb.parent/m[1]).resolve())}', c.source)
            cells.append(mk_cell(text, 'markdown'))
        if c.cell_type == 'code':
            text = re.sub(r'^#\|.*\n?', '', c.source, flags=re.M).strip()
            tags = ['remove-input'] if not text or '#| echo: false' in c.source else []
            if text or c.outputs: cells.append(mk_cell(text, outputs=c.outputs, metadata={'tags': tags}))
    return title,description,cells


def markdown(cells, url):
    for c in cells:
        if c.cell_type == 'markdown': yield re.sub(r'<span id=.*\n\n|\{\.source\}', '', c.source)
        elif not c.metadata['tags']: yield f'```python\n{c.source}\n```'
        for o in c.get('outputs', ()):
            data = o.get('data', {'text/plain': o.get('text', '')})
            if not data: continue # a figure shows itself and leaves an empty result
            if 'image/png' in data: yield f'*A picture: {url}*'
            elif 'text/markdown' in data: yield ''.join(data['text/markdown'])
            else: yield '```\n'+''.join(data['text/plain']).rstrip()+'\n```'


def local_links(text): return re.sub(rf'\]\({SITE}/(\S+?)\.html(?=[#)])', r'](/\1.ipynb', text) # Sphinx checks these


def toctree(caption, nbs):
    pages = ('Overview <self>' if nb.stem == 'index' else '/'+address(nb).removesuffix('.html') for nb in nbs)
    return mk_cell('\n'.join(['```{toctree}', ':hidden:', f':caption: {caption}' if caption else '', '', *pages, '```']), 'markdown')


def main(folder):
    shutil.copytree(NBS, folder/'pages', ignore=shutil.ignore_patterns('*.ipynb', '[._]*')) # pictures
    llms = [f'# {CFG.title}', '', f'> {CFG.description}']
    for caption,nbs in sections():
        llms += ['', f'## {caption or "Overview"}', '']
        for nb in nbs:
            url = address(nb)
            title,description,cells = read(nb)
            llms.append(f'- [{title}]({SITE}/{url}.md): {description}')
            text = folder/'extra'/f'{url}.md'
            text.parent.mkdir(parents=True, exist_ok=True)
            text.write_text('\n\n'.join(markdown(cells, f'{SITE}/{url}'))+'\n')
            for c in cells:
                c.source = local_links(c.source)
                for o in c.get('outputs', ()):
                    if 'text/markdown' in o.get('data', ()): o.data['text/markdown'] = local_links(''.join(o.data['text/markdown']))
            if url == 'index.html': cells += (toctree(*s) for s in sections())
            write_nb(new_nb(cells, {'language_info': {'name': 'python'}}), folder/'pages'/Path(url).with_suffix('.ipynb'))
    (folder/'extra/llms.txt').write_text('\n'.join(llms)+'\n')


if __name__ == '__main__': main(Path(sys.argv[1]))
