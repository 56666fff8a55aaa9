"""Every figure draws what its row of the table of figures declares"""
from inspect import signature

import pytest
from matplotlib.figure import Figure
from test_claims import table as invented
from helpers import make

from fastai_bnstats.study import figures
from fastai_bnstats.study.arms import ARMS
from fastai_bnstats.study.claims import CLAIMS
from fastai_bnstats.study.report_blocks import plain
from fastai_bnstats.study.figures import FIGURES, figure


@pytest.fixture
def rec(): return make(fits=(('freeze', 2), ('unfreeze', 4)), P=3)


def test_nine_figures(rec, tmp_path):
    for n in range(1, 10):
        fig = getattr(figures, f'fig{n}')(*[rec]*(2 if n == 5 else 1))
        assert isinstance(fig, Figure)
        fig.savefig(tmp_path/f'{n}.png', dpi=40)
        titles = [f.get_suptitle() for f in (fig, *fig.subfigs)]+[a.get_title() for a in fig.axes]
        assert any(f'Fig. {n} ' in t for t in titles)


@pytest.mark.parametrize('number,wrong,callback', [
    ('1g', 'weight', 'GradHistCallback'), ('3r', 'weight', 'GradHistCallback'), ('3o', 'weight', 'ActivationHistCallback')])
def test_a_figure_refuses_a_recording_of_another_quantity(rec, number, wrong, callback):
    f = FIGURES[number]
    match = f'draws {f.quantity}. Found a recording of {wrong}s: pass a recording of {callback}'
    with pytest.raises(ValueError, match=match): getattr(figures, f'fig{number}')(*[rec]*len(f.arms))


CLAIM_OF = {'1': 'b', '1g': 'b', '2': 'a', '3r': 'b', '4': 'a', '5': 'c', '6': 'd', '7': 'd', '8': 'e', '9': 'e'}


def test_each_figure_has_one_row():
    assert list(FIGURES) == ['1', '1g', '1o', '2', '3', '3g', '3o', '3r', '4', '5', '6', '7', '8', '9']
    for n, f in FIGURES.items():
        public = getattr(figures, f'fig{n}')
        assert f.number == n and f.draw is public and f.title == public.__doc__
        assert list(signature(public).parameters) == (['rec'] if len(f.arms) == 1 else ['rec_nobn', 'rec_bn'])
        assert set(f.arms) <= set(ARMS) and f.post and f.claim in {'', *(c.key for c in CLAIMS)}
        assert plain(f.measured(invented(2)))
    assert [n for n, f in FIGURES.items() if f.heat] == ['1', '1g', '1o', '3', '3g', '3o', '8', '9']
    assert [n for n, f in FIGURES.items() if f.quantity != 'weights'] == ['1g', '1o', '3g', '3o', '3r']
    assert {n: f.claim for n, f in FIGURES.items() if f.claim} == CLAIM_OF


def test_heat_maps_show_the_recording_of_the_figure(rec):
    assert FIGURES['1'].heat(rec) is rec
    d = FIGURES['8'].heat(rec)
    assert [list(p) for p in d.phase] == [['unfreeze'], ['freeze']] and d.epoch.max() == 1 # make() gives two epochs of freeze


def test_a_figure_has_one_arm_per_recording():
    with pytest.raises(AssertionError):
        @figure('naive_bn', 'freeze', post='', measured=len)
        def fig99(rec): pass
    assert '99' not in FIGURES
