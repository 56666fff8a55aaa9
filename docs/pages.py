"""Prepare the notebooks for Sphinx: `python docs/pages.py FOLDER` writes FOLDER/pages, and in FOLDER/extra each page as Markdown

nbdev processes the notebooks as for its own site. Only the reference is made here, from the modules: a notebook's own copy of a dataclass
has no comments, and nbdev leaves out constants and methods.
"""
import ast
import inspect
import re
import shutil
import sys
from collections import defaultdict
from importlib import import_module
from operator import attrgetter
from pathlib import Path

from fastcore.docments import DocmentText, docstring, empty
from fastcore.nbio import mk_cell, new_nb, read_nb, write_nb
from nbdev.config import get_config, nbpath2html
from nbdev.process import Processor
from nbdev.processors import FilterDefaults, clean_show_doc, exec_show_docs

CFG = get_config()
NBS,SITE = CFG.nbs_path,CFG.doc_host+CFG.doc_baseurl
FIRST = 'guides', 'tutorials', 'claims', 'record', 'freeze', 'plot', 'compare', 'recording', 'measure', 'study'


def address(nb): return nbpath2html(nb.relative_to(NBS)).as_posix()


def sections():
    "The sections of the sidebar in reading order: caption, notebooks"
    found = defaultdict(list)
    for nb in sorted(NBS.rglob('[!._]*.ipynb')): found[nb.parent.relative_to(NBS).as_posix()].append(nb)
    index = found['.'].pop(found['.'].index(NBS/'index.ipynb'))
    yield '',[index]
    for name in [*FIRST, *sorted({*found}-{*FIRST, '.'}), '.']:
        yield 'More' if name == '.' else f'Reference: {name}' if (CFG.lib_path/name).is_dir() else name.capitalize(), found[name]


def type_name(t):
    if t in (empty, None, type(None)): return ''
    return t.__name__ if inspect.isclass(t) else inspect.formatannotation(t).strip("'")


def entry(module, name, shown, level=3):
    "Signature, docstring and table of parameters; for a class, also its documented methods that have no entry of their own"
    obj = attrgetter(name)(module)
    code = getattr(obj, 'fget', obj) # of a property
    text = DocmentText(code, maxline=80, docstring=False)
    described = any(p.docment for p in text.dm.values())
    rows = ['| parameter | type | meaning |', '|---|---|---|']
    for n,p in text.dm.items():
        cells = '*returns*' if n == 'return' else n, type_name(p.anno), p.docment or ''
        if any(cells[1:]): rows.append('| '+' | '.join(c.replace('|', r'\|') for c in cells)+' |')
        p.update(docment=None, anno=empty if described else cells[1] or empty) # types are in the table, or else in the signature
    sig = re.sub(r"^def |<class '(?:\w+\.)*|'>|:$", '', str(text))
    sig = re.sub(r'\(\n +(.*)\n\)', r'(\1)', sig) # on one line if it fits
    path = Path(module.__file__).relative_to(CFG.lib_path.parent).as_posix()
    yield f"{'#'*level} {name}".replace('__', r'\_\_')
    yield f'[source]({CFG.git_url}/blob/{CFG.branch}/{path}#L{inspect.getsourcelines(code)[1]}){{.source}}'
    yield f"```python\n{sig if code is obj else sig.replace('()', '')}\n```"
    yield docstring(obj)
    if described: yield '\n'.join(rows)
    for n,f in vars(obj).items() if inspect.isclass(obj) else ():
        f = getattr(f, 'fget', getattr(f, '__func__', f)) # of a property or a class method
        if n[0] != '_' and inspect.isfunction(f) and f.__doc__ and f.__module__ == module.__name__ and f'{name}.{n}' not in shown:
            yield from entry(module, f'{name}.{n}', shown, level+1)


def constants(module, cell):
    "The assignments of public names in a cell, with an anchor for each name"
    tree,lines,code,names = cell.parsed_() or [],cell.source.splitlines(),[],[]
    for start,node in zip([0, *(n.end_lineno for n in tree)], tree): # with the comments above
        found = [n.id for t in getattr(node, 'targets', []) for n in ast.walk(t) if getattr(n, 'id', '') in module.__all__]
        if found: code += [l for l in lines[start:node.end_lineno] if l and l[:2] != '#|']
        names += found
    anchors = ''.join(f'<span id="{n}"></span>' for n in names)
    if names: return '\n'.join([anchors, '', '```python', *code, '```'])


class Reference(Processor):
    "Replace each `show_doc`, and show constants"
    def begin(self):
        cells = [c for c in self.nb.cells if c.cell_type == 'code']
        names = {c.idx_: m[1] for c in cells if (m:=re.match(r'show_doc\((.*)\)', c.source))}
        for c in cells:
            if 'default_exp' in c.directives_: module = import_module(f"{CFG.lib_name}.{c.directives_['default_exp']}")
        for c in cells[::-1]:
            if c.idx_ in names: c.update(cell_type='markdown', source='\n\n'.join(entry(module, names[c.idx_], names.values())))
            elif 'export' in c.directives_ and (text:=constants(module, c)): self.nb.cells.insert(c.idx_+1, mk_cell(text, 'markdown'))


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
        if c.cell_type == 'markdown': yield c.source
        elif not c.metadata['tags']: yield f'```python\n{c.source}\n```'
        for o in c.get('outputs', ()):
            data = o.get('data') or {'text/plain': o.text}
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
