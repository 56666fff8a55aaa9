"""Blocks of a document become HTML and Markdown, and text that looks like markup is escaped"""
import html
import re

import pytest
from jinja2 import UndefinedError

from fastai_bnstats.study.verdicts import VERDICTS
from fastai_bnstats.study.report_blocks import (Bullets, Heading, Paragraph, Picture, Quote, Span, Table, code, escape_markdown, join,
                                           markdown_code, paragraphs, plain, spans, styled, to_html, to_markdown, verdict_label)


def page_of(*blocks): return to_html([Heading('T', 1), *blocks])


def css_class(verdict): return verdict.replace(' ', '-')


def test_styles_come_from_the_sentence_and_not_from_its_values():
    assert styled('`a` and *b* or **{c}**', c='`*x*`') == [
        Span('a', 'code'), Span(' and '), Span('b', 'emphasis'), Span(' or '), Span('`*x*`', 'strong')]
    assert styled('`{x}`', x='{y}') == [Span('{y}', 'code')] and styled('') == []
    assert plain(join([code('a'), 'b'], ' / ')) == 'a / b' and spans(3) == [Span('3')]
    assert paragraphs("""
One *line*
goes on

Two
""") == [[Span('One '), Span('line', 'emphasis'), Span(' goes on')], [Span('Two')]]


def test_tables_and_verdicts():
    small = verdict_label('undecided')+spans(', but small')
    t = Table(['a', 'b'], [['x|y <z>', verdict_label('contradicted')], [verdict_label('parts disagree'), small]])
    page, text = page_of(t), to_markdown([t])
    assert 'x|y &lt;z&gt;' in page
    for v in ('contradicted', 'parts disagree', 'undecided'): assert f'<span class="verdict {css_class(v)}">{VERDICTS[v]}</span>' in page
    assert text.splitlines() == [
        '| a | b |',
        '| :-- | --: |',
        r'| x\|y \<z\> | **✘ contradicted** |',
        '| **⇄ parts disagree** | **? undecided**, but small |']
    assert page.count('class="number"') == 3 and 'data-label="a"' in page
    empty = page_of(Table(['a', 'b'], [['', 0]]))
    assert re.search(r'<td data-label="a"></td>', empty) and '<span>0</span>' in empty


def test_each_verdict_has_a_colour():
    page, grey = page_of(), ('undecided', 'not run')
    for v in VERDICTS:
        if v not in grey: assert f'.{css_class(v)}' in page


def test_all_blocks():
    blocks = [Heading('T', 1), Heading('Part', 2, 'part', 'To the part'), Paragraph('p', 'note'), Quote('q', 'who'),
              Bullets(['one', styled('**two**')]), Picture('a.png', 'an <a>', '7')]
    assert to_markdown(blocks) == '# T\n\n## Part\n\np\n\n> “q”\n>\n> who\n\n- one\n- **two**\n\n![an \\<a\\>](a.png)\n'
    page = to_html(blocks, 'w < x', address=lambda f: f'data:{f}', closer=lambda n: f'<i>{n}</i>', head='<style>b{}</style>')
    parts = ['<title>w &lt; x</title>', '<style>b{}</style>', '<a href="#part">To the part</a>', '<h2 id="part">Part</h2>',
             '<p class="note">p</p>', '<footer>who</footer>', '<li><strong>two</strong></li>', 'alt="an &lt;a&gt;" src="data:a.png"',
             '<i>7</i></details>']
    for part in parts: assert part in page


@pytest.mark.parametrize('s', ['<b>', 'a|b', '*x* **y** _z_', '[a](b)', '![a](b)', '`c`', r'\\', '# h', '&amp;', '{{ x }}', 'line\nbreak'])
def test_text_that_looks_like_markup_is_escaped(s):
    page = page_of(Paragraph(s), Table([s], [[s]]))
    assert html.unescape(page).count(s) >= 3 and (s == html.escape(s) or page.count(s) == 0 or s == '&amp;')
    text = to_markdown([Paragraph(s)]).rstrip('\n')
    assert not re.search(r'(?<!\\)(\\\\)*[`*_{}\[\]<>|#~&]', text) and text == escape_markdown(s) and '\n' not in text
    assert re.sub(r'\\(.)', r'\1', text) == s.replace('\n', ' ')


def test_code_can_contain_backticks_and_bars():
    assert markdown_code('a_b') == '`a_b`' and markdown_code('a`b') == '`` a`b ``' and markdown_code('a|b') == r'`a\|b`'


def test_a_verdict_without_a_label_is_an_error():
    with pytest.raises((UndefinedError, KeyError)): to_markdown([Paragraph(verdict_label('perhaps'))])
