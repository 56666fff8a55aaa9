"""Settings of Sphinx for the pages that pages.py makes"""
import re

from docutils import nodes
from latex2mathml.converter import convert

import fastai_bnstats

project = html_title = 'fastai_bnstats'
author = 'the fastai_bnstats authors'
copyright = f'2026, {author}'
version = release = fastai_bnstats.__version__
extensions = ['myst_nb']
nb_execution_mode = 'off' # the notebooks keep their outputs
nb_merge_streams = True
nb_render_markdown_format = 'myst'
myst_enable_extensions = ['attrs_inline', 'dollarmath']
myst_heading_anchors = 4
# a notebook is plain Markdown
myst_disable_syntax = ['myst_block_break', 'myst_line_comment', 'myst_role', 'myst_target']
# some pages go from the title to a function directly; a function among the settings can't be cached
suppress_warnings = ['myst.header', 'config.cache']
smartquotes = False # quotes are often those of code
html_theme = 'furo'
pygments_dark_style = 'github-dark'
html_static_path = ['style.css']
html_favicon = 'icon.svg'
html_css_files = ['style.css']
html_copy_source = html_use_index = False
html_math_renderer = 'mathml'


def make_id(text):
    "The anchor that GitHub gives a heading, and that nbdev's links use; docutils has no dots and underscores"
    return re.sub(r'[^\w\s.-]', '', text).strip().lower().replace(' ', '-')


nodes.make_id = myst_heading_slug_func = make_id # Sphinx can pickle it, because docutils has it too


def add_ids(app, doctree):
    "Sphinx's search doesn't find a section whose first anchor has a dot"
    for section in doctree.findall(nodes.section):
        if '.' in section['ids'][0]: section['ids'].insert(0, section['ids'][0].replace('.', '-'))


def mathml(self, node):
    self.body.append(convert(node.astext(), display='block' if isinstance(node, nodes.math_block) else 'inline'))
    raise nodes.SkipNode


def setup(app):
    app.connect('doctree-read', add_ids, priority=400) # before the table of contents is made
    app.add_html_math_renderer('mathml', (mathml, None), (mathml, None))
