"""The figures of the study, drawn from any recording"""
import pytest
from matplotlib.figure import Figure

from fastai_bnstats.study import figures


def test_nine_figures(rec, tmp_path):
    for n in range(1, 10):
        fig = getattr(figures, f'fig{n}')(*[rec]*(2 if n == 5 else 1))
        assert isinstance(fig, Figure)
        fig.savefig(tmp_path/f'{n}.png', dpi=40)
        titles = [f.get_suptitle() for f in (fig, *fig.subfigs)]+[a.get_title() for a in fig.axes]
        assert any(f'Fig. {n} ' in t for t in titles)


def test_companions_refuse_other_quantities(rec):
    with pytest.raises(ValueError, match='draws gradients. Found a recording of weights: pass one of a GradHistCallback'):
        figures.fig1g(rec)
    with pytest.raises(ValueError, match='pass one of a ActivationHistCallback'): figures.fig3o(rec)
