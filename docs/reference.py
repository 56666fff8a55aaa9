"""The reference on a page: an entry for each `show_doc`, and the constants

Both come from the module. A notebook's own copy of a dataclass has no comments; and nbdev's entries leave out constants, methods, and the
comments of named tuples, of `**kwargs`, and of returned values without a type.
"""
import ast
import inspect
import re
from dataclasses import is_dataclass
from importlib import import_module
from io import StringIO
from operator import attrgetter
from pathlib import Path
from textwrap import dedent
from tokenize import COMMENT, generate_tokens
from typing import Union, get_args, get_origin

from fastcore.nbio import mk_cell
from nbdev.config import get_config
from nbdev.process import Processor

CFG = get_config()
empty = inspect.Parameter.empty


class Name(str):
    "How `inspect.signature` shows a type: without its module"
    __repr__ = str.__str__


def type_name(annotation, default=empty):
    t = type(default) if annotation is empty and default is not empty else annotation
    if t in (empty, None, type(None)): return Name()
    if get_origin(t) is Union: return Name(' | '.join(type_name(a) for a in get_args(t)))
    return Name(t.__name__ if inspect.isclass(t) else re.sub(r"(\w+\.)+|'", '', inspect.formatannotation(t)))


def comments(obj):
    "The comments of a signature, or of the fields of a class: {name: text}"
    init = getattr(obj, '__init__', None)
    if inspect.isfunction(init) and init.__module__.startswith(CFG.lib_name) and not is_dataclass(obj): obj = init
    source = dedent(inspect.getsource(obj))
    found = {t.start[0]: t.string[1:].strip() for t in generate_tokens(StringIO(source).readline) if t.type == COMMENT}
    node = ast.parse(source).body[0]
    if isinstance(node, ast.ClassDef): lines = {n.lineno: n.target.id for n in node.body if isinstance(n, ast.AnnAssign)}
    else:
        a,end = node.args,node.returns.lineno if node.returns else node.body[0].lineno-1
        lines = {p.lineno: p.arg for p in (*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg) if p and p.arg != 'self'}
        if node.returns or end not in lines: lines[end] = 'return'
    return {name: found[line] for line,name in lines.items() if line in found}


def entry(module, name, shown, level=3):
    "Signature, docstring and table of parameters; for a class, also its documented methods that have no entry of their own"
    obj = attrgetter(name)(module)
    code = getattr(obj, 'fget', obj) # of a property
    sig = inspect.signature(obj.__init__ if inspect.isclass(obj) and issubclass(obj, Exception) else code)
    said = comments(code)
    params = [p for n,p in sig.parameters.items() if n != 'self']
    rows = [(p.name, type_name(p.annotation, p.default), said.get(p.name, '')) for p in params]
    rows.append(('*returns*', type_name(None if inspect.isclass(obj) else sig.return_annotation), said.get('return', '')))
    types = [empty if said else t or empty for _,t,_ in rows] # a table has them, otherwise the signature
    sig = sig.replace(parameters=[p.replace(annotation=t) for p,t in zip(params, types)], return_annotation=types[-1])
    text = re.sub(r"<\w+ ['<]?(?:\w+\.)*(\w+)[^,)]*>", r'\1', str(sig)) # a class or function as default
    path = Path(module.__file__).relative_to(CFG.lib_path.parent).as_posix()
    yield f"{'#'*level} {name}".replace('__', r'\_\_')
    yield f'[source]({CFG.git_url}/blob/{CFG.branch}/{path}#L{inspect.getsourcelines(code)[1]}){{.source}}'
    yield f"```python\n{name.rpartition('.')[2]}{text if code is obj else text[2:]}\n```"
    yield inspect.getdoc(obj) or ''
    table = [('parameter', 'type', 'meaning'), ['---']*3, *(r for r in rows if any(r[1:]))]
    if said: yield '\n'.join('| '+' | '.join(c.replace('|', r'\|') for c in r)+' |' for r in table)
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
        names = {c.idx_: m[1] for c in cells if (m:=re.match(r'show_doc\(([\w.]+)', c.source))}
        for c in cells:
            if 'default_exp' in c.directives_: module = import_module(f"{CFG.lib_name}.{c.directives_['default_exp']}")
        for c in cells[::-1]:
            if c.idx_ in names: c.update(cell_type='markdown', source='\n\n'.join(entry(module, names[c.idx_], names.values())))
            elif 'export' in c.directives_ and (text:=constants(module, c)): self.nb.cells.insert(c.idx_+1, mk_cell(text, 'markdown'))
