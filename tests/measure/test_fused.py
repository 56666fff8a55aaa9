"""The Triton kernel counts correctly when interpreted on the host, and compiles for GPUs"""
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from forks import run, script
from test_device import EDGES, SPECIAL, around, check, draw_tensors

from fastai_bnstats.measure import fused as kernel
from fastai_bnstats.measure.device import DevicePlan
from fastai_bnstats.measure.fused import FusedPlan
from fastai_bnstats.measure.edges import uniform_edges

# the variable must be set before triton is imported, so `test_interpreted` runs this file again in another process
INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
pytestmark = pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='triton is not installed')


def python(*args, **env): return subprocess.run([sys.executable, *args], capture_output=True, text=True, env={**os.environ, **env})


if INTERPRETED:
    @pytest.fixture(autouse=True, params=[256, 8192])
    def block(request, monkeypatch): monkeypatch.setattr(kernel, 'BLOCK', request.param) # many blocks per tensor, or one

    def plan_check(xs, edges): check(xs, edges, FusedPlan(xs, edges)(xs))

    @settings(max_examples=15, deadline=None, suppress_health_check=['function_scoped_fixture'])
    @given(data=st.data(), n=st.integers(1, 4), which=st.integers(0, 3))
    def test_any_tensors(data, n, which):
        plan_check(draw_tensors(data, n), [EDGES[(which+i) % 4] for i in range(n)])

    @pytest.mark.parametrize('g', EDGES)
    def test_values_on_edges(g):
        x = around(g)
        plan_check([x, x.half(), SPECIAL.repeat(60)], [g]*3)

    @pytest.mark.parametrize('bins', [1, 2, 28, 29, 300])
    def test_any_number_of_bins(bins):
        g = uniform_edges(-1, 2, bins)
        plan_check([torch.randn(2000), around(g)], [g]*2)

    @pytest.mark.parametrize('off', [-.9, -.5, .5, .9])
    def test_edges_decide(off):
        x = around(EDGES[0])
        plan = FusedPlan([x], EDGES[:1])
        plan.line[0] += off
        check([x], EDGES[:1], plan([x]))

    def test_mean_ten_thousand_times_the_deviation():
        x = torch.randn(20_000)*1e-3+10
        x[::7] = float('nan')
        plan_check([x], [uniform_edges(9.9, 10.1, 40)])

    def test_missing_tensors():
        xs = [torch.randn(5, 700), torch.randn(3), torch.zeros(0), torch.randn(1024)]
        fused, plain = FusedPlan(xs, EDGES), DevicePlan(xs, EDGES)
        for now in (xs, [None, xs[1], None, torch.zeros(0)], [None]*4, xs):
            torch.testing.assert_close(fused(now), plain(now), rtol=1e-12, atol=1e-14, equal_nan=True)
        assert not FusedPlan([torch.zeros(0)], EDGES[:1])([torch.zeros(0)])[:, :-2].any()

    def test_addresses_are_updated_only_when_they_change():
        x = torch.randn(500)
        plan = FusedPlan([x], EDGES[:1])
        plan([x])
        before = plan.tensors._version
        check([x.mul_(2)], EDGES[:1], plan([x]))
        assert plan.tensors._version == before
        check([y := x+1], EDGES[:1], plan([y]))
        assert plan.tensors._version == before+1

    def test_parts_of_a_tensor():
        x = torch.randn(40, 100)
        plan_check([x[3:7], x[:, 5], x.T, torch.nn.Parameter(x)], EDGES[:1]*4)

else:
    @pytest.mark.slow
    def test_interpreted():
        "All tests above; overflow in NumPy, which interprets the kernel, is ignored"
        p = python('-m', 'pytest', '-n', '0', '-q', '-W', 'ignore::RuntimeWarning', __file__, TRITON_INTERPRET='1')
        assert p.returncode == 0 and ' passed' in p.stdout and 'skipped' not in p.stdout, p.stdout[-4000:]

    COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from fastai_bnstats.measure.fused import BLOCK, _kernel
for B, K, cc in ((1, 32, 80), (40, 64, 80), (40, 64, 90)):
    sizes = dict(B=B, K=K, STEPS=(B+1).bit_length(), BLOCK=BLOCK)
    kinds = dict(tensors='*i64', blocks='*i32', starts='*fp32', line='*fp32', counts='*i64', parts='*fp64', P='i32', N='i32')
    source = ASTSource(_kernel(), {**kinds, **dict.fromkeys(sizes, 'constexpr')}, sizes)
    compiled = compile(source, target=GPUTarget('cuda', cc, 32), options=dict(num_warps=16, enable_fp_fusion=True))
    assert '.entry _count' in compiled.asm['ptx']
"""

    @pytest.mark.slow
    @pytest.mark.skipif(sys.platform != 'linux', reason='triton compiles on Linux')
    def test_compiles_for_gpus(tmp_path):
        p = python('-c', COMPILE, TRITON_CACHE_DIR=str(tmp_path))
        assert p.returncode == 0, p.stderr[-3000:]

    def test_error_on_the_host():
        error = 'needs tensors on a CUDA device. Found cpu: use `DevicePlan`, or set TRITON_INTERPRET=1'
        with pytest.raises(ValueError, match=error): FusedPlan([torch.ones(3)], EDGES[:1])

    @pytest.mark.slow
    @pytest.mark.skipif(torch.cuda.is_available(), reason='the benchmark would run')
    def test_benchmark_needs_a_gpu():
        p = run(script, Path(__file__).parents[2]/'benchmarks/gpu.py')
        assert p.returncode == 1 and re.search('needs a CUDA device. Found none.*run it where', p.stderr)


def test_imports_without_triton():
    code = """
import sys
sys.modules['triton'] = None
import torch
from fastai_bnstats.measure import FusedPlan
FusedPlan([torch.ones(3)], [[0, 1.]])
"""
    p = python('-c', code, TRITON_INTERPRET='1')
    assert 'ImportError: FusedPlan is a Triton kernel. Found no package triton here, expected triton>=3' in p.stderr
    assert 'install it, or use `DevicePlan`' in p.stderr
