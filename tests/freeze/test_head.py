"""Where the head begins, and the groups of bn_splitter"""
import pytest
import torch
from helpers import tiny_learner, tiny_model
from fastai.basics import nn, trainable_params
from fastai.vision.all import xresnet18
from freeze_cases import BNS, CONVS, HEAD
from torchvision.models import densenet121, resnet18 as tv_resnet18

from fastai_bnstats.freeze import bn_splitter, find_head
from fastai_bnstats.freeze.head import name_params


def test_a_doubtful_head_is_reported():
    class Odd(nn.Module): # the last child is a norm
        def __init__(self): super().__init__(); self.head, self.body, self.norm = nn.Linear(4, 2), tiny_model()[0], nn.BatchNorm2d(4)
        def forward(self, x): return self.head(self.norm(self.body(x)).mean((2, 3)))
    class First(nn.Module): # the head comes first
        def __init__(self): super().__init__(); self.fc, self.body = nn.Linear(4, 2), tiny_model()[0]
        def forward(self, x): return self.fc(self.body(x).mean((2, 3)))
    one_each = lambda m: [[p] for p in m.parameters()]
    cases = ((Odd(), trainable_params, 'it is a norm layer'), (tiny_model(), one_each, 'it is only a part of a layer'),
             (First(), trainable_params, 'it holds 96% of all parameters, including convolutions'))
    for model, splitter, warning in cases:
        learn, log = tiny_learner(model, splitter=splitter), []
        learn.logger = log.append
        learn.freeze_body()
        assert f'This may not be the head, because {warning}. If it is not, pass head=.' in log[0]


def test_names_of_wrapped_models():
    m = tiny_model()
    assert [id(p) for p in find_head(m, 'module.1')[0]] == [id(p) for p in m[1].parameters()]
    c = torch.compile(m, backend='eager')
    assert [id(p) for p in find_head(c, '1')[0]] == [id(p) for p in m[1].parameters()]
    assert [find_head(c, h)[1] for h in ('1', '_orig_mod.1')] == ['1', '1'] and name_params(c, list(m[1].parameters())) == ['1']


def two_parts():
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 2))
    return nn.Sequential(nn.Sequential(*list(xresnet18(n_out=2))[:8]), head)


@pytest.mark.parametrize('arch,head', [
    (two_parts, '1'), (lambda: xresnet18(n_out=2), '8 '), (lambda: tv_resnet18(weights=None), 'avgpool '),
    (lambda: densenet121(weights=None), 'classifier'),
    (lambda: nn.Sequential(tiny_model()), '0.1'), (lambda: nn.Sequential(tiny_model()[0], nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)), '3')])
def test_where_the_head_is(arch, head):
    m = arch()
    ps, found = find_head(m)
    assert found.startswith(head) and 0 < len(ps) < len(list(m.parameters()))


def test_head_by_name_module_and_list():
    m = tiny_model()
    for h in ('1.3', m[1][3], [m[1][3]]): assert [id(p) for p in find_head(m, h)[0]] == [id(p) for p in m[1][3].parameters()]
    with pytest.raises(ValueError, match="Found Linear, which is not in this Sequential; its children are 0, 1"):
        find_head(m, nn.Linear(1, 1))
    with pytest.raises(ValueError, match="Found 'fc', which is not in this Sequential"): find_head(m, 'fc')
    for h, n in (([], 'no'), (m, 'all')):
        with pytest.raises(ValueError, match=f'some parameters of the model, but not all. Found {n} parameters of this Sequential'):
            find_head(m, h)
    with pytest.raises(ValueError, match='No head found in ReLU.* Pass head='): find_head(nn.ReLU())


def test_splitter_groups():
    m = tiny_model()
    names = {id(p): n for n, p in m.named_parameters()}
    assert [{names[id(p)] for p in g} for g in bn_splitter(m)] == [CONVS, BNS, HEAD]
    learn = tiny_learner(splitter=bn_splitter)
    learn.freeze_to(1)
    assert [p.requires_grad for p in learn.model.parameters()] == [n in BNS | HEAD for n, _ in learn.model.named_parameters()]
