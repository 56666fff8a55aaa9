"""Measure what recording weights costs, in comparison with a training step and with other libraries.

    pip install '.[bench]' && python benchmarks/overhead.py --out overhead.md"""

import importlib.metadata,os,platform,random,tempfile
from collections import namedtuple
from contextlib import ExitStack,contextmanager
from datetime import date
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from fastai.vision.all import *
from fastai.callback.hook import ActivationStats
from fastcore.script import CliError,call_parse

from numba import njit

from fastai_bnstats.measure import auto_range,compiled,tensor_stats,uniform_edges
from fastai_bnstats.measure.edges import line_through
from fastai_bnstats.record import UpdateHistCallback,WeightHistCallback,edges_of,select_tensors

BINS = 40
METHODS = STEP,FLOOR,STATS,CALLBACK,UPDATES,POST,NUMPY,BOARD,WANDB,ACTS = [
    'training step',
    'floor: `sum()` of each tensor',
    'ours: `tensor_stats`',
    'ours: `WeightHistCallback`',
    'ours: `UpdateHistCallback`',
    'loop of `histc`, `mean`, `var`',
    '`numpy.histogram`, `mean`, `var`',
    'TensorBoard `add_histogram`',
    "wandb offline, `watch(log='parameters', log_freq=1)`",
    'fastai `ActivationStats(with_hist=True)`']

# --- models
Case = namedtuple('Case', 'name size more') # name of the model, size in pixels, factor of the number of rounds
CASES = [Case('xresnet18',64,1), Case('xresnet18',128,.5), Case('xresnet50',64,.5), Case('mlp',None,20)]

def new_learner(case, n, cbs):
    "A learner whose epoch repeats one batch of 64 random samples of 10 classes `n` times"
    set_seed(0)
    if case.size: model,x = globals()[case.name](n_out=10),torch.randn(64,3,case.size,case.size)
    else: model,x = nn.Sequential(nn.Linear(20,64), nn.ReLU(), nn.Linear(64,40), nn.ReLU(), nn.Linear(40,10)),torch.randn(64,20)
    y = torch.randint(10, (64,))
    return Learner(DataLoaders(*(DataLoader([(x,y)]*k, bs=None) for k in (n,1))), model, loss_func=CrossEntropyLossFlat(), cbs=cbs)

# --- methods of recording, as functions to call after a batch
def own_ways(tensors):
    "Methods that need only torch and numpy"
    ws,edges = [t for _,t,_ in tensors],edges_of(tensors, BINS)
    ranges = [(e[0].item(), e[-1].item()) for e in edges]
    def floor():
        for w in ws: w.sum()
    def post(): return [(w.histc(BINS,*r), w.mean(), w.var()) for w,r in zip(ws,ranges)]
    def with_numpy(): return [(np.histogram(a,BINS,r), a.mean(), a.var()) for a,r in zip([w.detach().numpy() for w in ws], ranges)]
    return {FLOOR:floor, STATS:lambda: tensor_stats(ws, edges), POST:post, NUMPY:with_numpy}

def board_way(tensors, stack):
    "TensorBoard's default histogram of the same tensors"
    from torch.utils.tensorboard import SummaryWriter
    writer = SummaryWriter(stack.enter_context(tempfile.TemporaryDirectory()))
    stack.callback(writer.close)
    def board():
        for n,t,_ in tensors: writer.add_histogram(n, t)
    return board

def wandb_way(model, stack):
    "wandb's forward hook, which logs all parameters of the model including batch norm and biases, and the `log` that ends a step"
    folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
    os.environ |= {f'WANDB_{k}_DIR':folder for k in ('CACHE','CONFIG','DATA','ARTIFACT')}
    os.environ |= {'WANDB_MODE':'offline', 'WANDB_ERROR_REPORTING':'false', 'WANDB_SILENT':'true'}
    import wandb # reads the environment
    off = {f'x_disable_{k}':True for k in ('meta','stats','machine_info')}
    quiet = wandb.Settings(silent=True, console='off', save_code=False, disable_git=True, **off)
    run = wandb.init(mode='offline', dir=folder, settings=quiet)
    stack.callback(run.finish)
    before = set(model._forward_hooks)
    run.watch(model, log='parameters', log_freq=1)
    hook, = [h for i,h in model._forward_hooks.items() if i not in before]
    stack.callback(run.unwatch, model)
    for i in set(model._forward_hooks)-before: del model._forward_hooks[i] # so that it does not run in the training step
    def watch():
        hook(model, (), None)
        run.log({'loss':0.})
    return watch

def installed(*names):
    "Versions of the installed packages among `names`"
    res = []
    for n in names:
        try: res.append((n, importlib.metadata.version(n)))
        except importlib.metadata.PackageNotFoundError: pass
    return dict(res)

# --- timing
def ms_of(f):
    start = perf_counter()
    f()
    return (perf_counter()-start)*1000

def in_turn(ways, k):
    "Milliseconds of each of `ways`; the order depends on `k`, because the method before influences the caches"
    return {n:ms_of(ways[n]) for n in random.Random(k).sample(list(ways), len(ways))}

@contextmanager
def threads_set_to(n):
    "Use `n` torch threads, and restore the number afterwards"
    was = torch.get_num_threads()
    torch.set_num_threads(n)
    try: yield
    finally: torch.set_num_threads(was)

class Timed:
    "A callback that adds up the seconds of all its events"
    spent = 0.
    def __call__(self, event_name):
        start = perf_counter()
        try: return super().__call__(event_name)
        finally: self.spent += perf_counter()-start

class TimedWeights(Timed,WeightHistCallback): pass
class TimedUpdates(Timed,UpdateHistCallback): pass

def acts_ms(learn, modules):
    "Milliseconds of the hooks of `ActivationStats` in a forward pass, plus its `after_batch`"
    cb,spent,start = ActivationStats(with_hist=True, modules=modules),0.,0.
    cb.learn = learn
    def begin(*_):
        nonlocal start
        start = perf_counter()
    def end(*_):
        nonlocal spent
        spent += perf_counter()-start
    first = [m.register_forward_hook(begin) for m in modules] # before the hooks of `cb`, `last` after them
    cb.before_fit()
    last = [m.register_forward_hook(end) for m in modules]
    learn.model(*learn.xb)
    res = spent*1000+ms_of(cb.after_batch)
    for h in first+last: h.remove()
    cb.after_fit()
    return res

class Rounds(Callback):
    "Times each batch of a fit, and after it all methods of recording; batches alternate between the numbers of threads"
    order,run_valid = 100,False
    def __init__(self, timed, threads, ways, modules):
        store_attr()
        self.got = {t:[] for t in threads}
    def before_batch(self):
        self.n_threads = self.threads[self.iter%len(self.threads)]
        torch.set_num_threads(self.n_threads)
        self.spent,self.start = {m:cb.spent for m,cb in self.timed.items()},perf_counter()
    def after_batch(self):
        whole,ours = (perf_counter()-self.start)*1000,{m:(cb.spent-self.spent[m])*1000 for m,cb in self.timed.items()}
        with torch.no_grad(): ms = in_turn(self.ways, self.iter//len(self.threads))
        acts = acts_ms(self.learn, self.modules)
        self.got[self.n_threads].append({STEP:whole-sum(ours.values()), **ours, **ms, ACTS:acts})

def measure(case, rounds, threads, peers):
    "Milliseconds {threads: {method: [one per round]}} in a fit; number of rounds, of weights, of recorded tensors and of all parameters"
    n = max(3, round(rounds*case.more))
    timed = {CALLBACK:TimedWeights(bins=BINS), UPDATES:TimedUpdates(bins=BINS)}
    learn = new_learner(case, (n+1)*len(threads), list(timed.values()))
    tensors = select_tensors(learn.model)
    with ExitStack() as stack:
        ways = own_ways(tensors)
        if 'tensorboard' in peers: ways[BOARD] = board_way(tensors, stack)
        if 'wandb' in peers: ways[WANDB] = wandb_way(learn.model, stack)
        cb = Rounds(timed, threads, ways, [m for *_,m in tensors])
        with threads_set_to(torch.get_num_threads()), learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-4, cbs=cb)
    n_rows,n_batches = min(len(cb.recording) for cb in timed.values()),len(learn.dls.train)
    if n_rows!=n_batches: raise CliError(f"A callback recorded {n_rows} of {n_batches} batches, so its times are not valid.")
    got = {t:{m:[r[m] for r in rs[1:]] for m in rs[0]} for t,rs in cb.got.items()} # the first round warms up
    return got, n, sum(t.numel() for _,t,_ in tensors), len(tensors), len(list(learn.model.parameters()))

# --- tables
def md(head, rows):
    fmt = lambda c: c if isinstance(c,str) else f'{c:,.0f}' if c>=100 else f'{c:.3g}'
    line = lambda cs: '| '+' | '.join(map(fmt,cs))+' |'
    return '\n'.join([line(head), '|'+'---|'+'---:|'*(len(head)-1), *map(line,rows)])+'\n'

def case_table(got):
    step,floor = (np.median(got[1][m]) for m in (STEP,FLOOR))
    rows = []
    for t,ms in got.items():
        ours = np.median(ms[CALLBACK])
        for m in filter(ms.__contains__, METHODS):
            med = np.median(ms[m])
            rows.append([m, str(t), med, min(ms[m]), med/floor, 100*med/step, '' if m in METHODS[:5] else med/ours])
    return md(['method', 'threads', 'ms a batch', 'its minimum', 'times the floor', '% of the step', 'times our callback'], rows)

def verdict(v, asked, least=False): return f"{v:.3g}, {'met' if (v>=asked if least else v<=asked) else 'missed'}"

def targets_table(got, large):
    "The targets for xresnet18 at 64 px, and for its step at 128 px (`large`): medians with a verdict, and minima"
    rows = []
    def add(what, threads, asked, f, least=False):
        rows.append([what, str(threads), f"{'≥' if least else '≤'} {asked}", verdict(f(np.median), asked, least), f(min)])
    one = got[1]
    for t,ms in got.items():
        add('`tensor_stats` / floor', t, 4 if t==1 else 2.5, lambda f,ms=ms: f(ms[STATS])/f(one[FLOOR]))
        add('`WeightHistCallback` / floor', t, 4.5 if t==1 else 2.8, lambda f,ms=ms: f(ms[CALLBACK])/f(one[FLOOR]))
        add('`WeightHistCallback`, % of the step at as many threads', t, 2, lambda f,ms=ms: 100*f(ms[CALLBACK])/f(ms[STEP]))
        add('`UpdateHistCallback` / `WeightHistCallback`', t, 1.7, lambda f,ms=ms: f(ms[UPDATES])/f(ms[CALLBACK]))
        for other,asked in ((POST,5), (BOARD,18), (WANDB,20), (ACTS,10)):
            if other in ms: add(f'{other} / `WeightHistCallback`', t, asked, lambda f,ms=ms,o=other: f(ms[o])/f(ms[CALLBACK]), True)
    for t,ms in large.items():
        add('`WeightHistCallback`, % of the step of 128 px', t, .5, lambda f,ms=ms: 100*f(ms[CALLBACK])/f(ms[STEP]))
    for t,ms in got.items():
        if t>1:
            for m in STATS,CALLBACK,UPDATES:
                add(f'{m}: time at one thread / time at {t}', t, 1.6, lambda f,ms=ms,m=m: f(one[m])/f(ms[m]), True)
    return md(['target', 'threads', 'asked', 'median', 'by minima'], rows)

# --- scaling
def stats_and_floor(n, k, bins):
    "`tensor_stats` of `k` tensors with `n` weights together, and the floor"
    ws = [w.clone() for w in torch.randn(n, generator=torch.Generator().manual_seed(0)).mul(.02).chunk(k)]
    edges = [uniform_edges(*auto_range(ws[0]), bins)]*k
    def floor():
        for w in ws: w.sum()
    return lambda: tensor_stats(ws, edges), floor

def growth_table(head, cases, rounds):
    "Median times of `tensor_stats` for `cases`: tuples of weights, tensors and bins, of which the column `head` varies"
    ways = {}
    for c in cases: ways[c,'ours'],ways[c,'floor'] = stats_and_floor(*c)
    with torch.no_grad(): got = [in_turn(ways, k) for k in range(rounds+1)][1:]
    ms = {w:np.median([g[w] for g in got]) for w in ways}
    varied = ('weights','tensors','bins').index(head)
    rows = [[f'{c[varied]:,}', ms[c,'ours'], ms[c,'ours']/ms[c,'floor'], 1e6*ms[c,'ours']/c[0]] for c in cases]
    return md([head, 'ms', 'times the floor', 'ns a weight'], rows)

def growth(rounds, n_max):
    "Headings and tables of the time of `tensor_stats` on one thread, by the number of weights, of tensors and of bins"
    n,sizes = n_max//10,[int(m) for m in (1e4,3e4,1e5,3e5,1e6,3e6,1e7,3e7) if m<=n_max]
    cases = {'weights':[(m,1,BINS) for m in sizes], 'tensors':[(n,k,BINS) for k in (1,3,10,30,100,300,1000)],
             'bins':[(n,1,b) for b in (10,20,40,80,160,200,320,500)]}
    heads = {'weights':f'By the number of weights (one tensor, {BINS} bins):',
             'tensors':f'By the number of tensors ({n:,} weights together, {BINS} bins):',
             'bins':f'By the number of bins (one tensor of {n:,} weights):'}
    with threads_set_to(1):
        for k in cases: yield heads[k],growth_table(k, cases[k], rounds)

def repeated(f):
    "`f` called `n` times in compiled code, since a call from Python takes longer than a chunk"
    f = njit(f)
    @njit
    def loop(n, *args):
        for _ in range(n): f(*args)
    return loop

def parts(rounds):
    "Table of the times of the loops over a chunk in `tensor_stats`, each measured alone"
    C,K,n = compiled.CHUNK,BINS+2,2**20//compiled.CHUNK
    x = torch.randn(C, generator=torch.Generator().manual_seed(0)).mul(.02)
    e = uniform_edges(*auto_range(x[None]), BINS)
    line = compiled.fixed_point(*line_through(e), BINS)
    x,q,pairs,table,before = x.numpy(),np.zeros(C, np.int32),np.zeros(C//2, np.int32),np.zeros(K*K, np.uint32),np.zeros(C, np.float32)
    shift,scale = line[:2].astype(np.float32)
    first,last = np.float32(2.**17),np.float32((K-.5)*2**18)
    def sums(x, out): out[0] += compiled._sums(x, .1)[1]
    def distance(q, out): out[0] = compiled._least_distance(q, np.int32(5), np.int32(2**18-1))
    def count_pairs(pairs, table, x): compiled._count_pairs(pairs, table, (x,), 0)
    def change(x, before, diff, out): out[0] += compiled._change(x, before, x, diff)[1]
    def differ(x, y, out): out[0] = compiled._differ(x, y)
    out,y = np.zeros(1),x.copy()
    loops = {'sums of values and squares': (sums, x, out),
             'bins in fixed point': (compiled._guess.py_func, x, q, shift, scale, first, last),
             'is one close to an edge?': (distance, q, out),
             'pairs': (compiled._pairs.py_func, q, pairs, np.int32(K)),
             'count pairs, ask for memory': (count_pairs, pairs, table, x),
             'changes and two norms (updates only)': (change, x, before, y, out),
             'has something else moved? (updates only)': (differ, x, x.copy(), out)}
    ways = {}
    for name,(f,*args) in loops.items(): ways[name] = partial(repeated(f), n, *args)
    for f in ways.values(): f()
    with threads_set_to(1): got = [in_turn(ways, k) for k in range(rounds)]
    ns = {m:1e6*min(r[m] for r in got)/(n*C) for m in ways}
    return md(['loop', 'ns a weight'], list(ns.items()))

def cpu_model():
    info = Path('/proc/cpuinfo')
    names = [l.split(':')[1].strip() for l in info.read_text().splitlines() if l.startswith('model name')] if info.exists() else []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"

METHOD = ' '.join(f"""
The script trains with fastai on batches of 64 random samples (forward, backward, Adam). It times each batch, and after it every method of
recording, in random order. Successive batches use the numbers of threads in turn. Times are medians over the rounds. Unless stated
otherwise, a method records the weights of convolution and linear layers: {BINS} bins, mean and variance. "Times the floor" is relative to
one read of all these weights on one thread, "% of the step" to the training step on one thread. `WeightHistCallback` is the time of all
its events in a batch, including the loss. `ActivationStats` is the time of its hooks on the same modules in a forward pass in training
mode, and of its `after_batch`. wandb's hook always logs all parameters, and its time includes the `run.log` that ends the step. Compare
ratios only within one run, and milliseconds only on one machine. If the noise below is well above 1, other processes were running: repeat
the run.
""".split())

@call_parse
def main(
    models:str='xresnet18,xresnet50,mlp', # models to train
    threads:str='1,2', # numbers of torch threads; 1 is always included, because ratios refer to it
    rounds:int=12, # rounds of xresnet18 at 64 px; larger cases have half as many, the MLP 20 times as many
    quick:bool=False, # test the script: 3 rounds, only xresnet18 at 64 px and the MLP, smaller tensors
    peers:bool=True, # skip TensorBoard and wandb
    out:str=None, # file to save the report in
):
    "Measure what recording weights costs, and print a report in Markdown"
    names,ts = models.split(','),list(dict.fromkeys([1]+[int(t) for t in threads.split(',')]))
    known = list(dict.fromkeys(c.name for c in CASES))
    if bad := set(names)-set(known): raise CliError(f"Unknown model {', '.join(sorted(bad))}. Expected some of {', '.join(known)}.")
    if rounds<1 or min(ts)<1: raise CliError(f"--rounds and --threads must be at least 1. Found --rounds {rounds} --threads {threads}.")
    cases = [c for c in CASES if c.name in names and not (quick and (c.size==128 or c.name=='xresnet50'))]
    if quick: rounds = 3
    found = installed('tensorboard', 'wandb') if peers else {}
    start,text,res = perf_counter(),[],{}
    def report(s):
        text.append(s)
        print(s, flush=True)
    versions = ', '.join(f'{p} {v}' for p,v in (installed('torch', 'fastai', 'numpy')|found).items())
    environment = f'{date.today()}. {cpu_model()}. Python {platform.python_version()}, {versions}. {rounds} rounds.'
    report(f'# What recording weights costs\n\n{environment}\n\n{METHOD}\n')
    for p in ('tensorboard','wandb'):
        if peers and p not in found: report(f"{p} is skipped, because it is not installed: `pip install '.[bench]'`.\n")
    for c in cases:
        got,n,weights,k,k_all = measure(c, rounds, ts, found)
        res[c.name,c.size] = got
        noise = ', '.join(f"{np.median(ms[FLOOR])/min(ms[FLOOR]):.2g} with {t}" for t,ms in got.items())
        title = f'{c.name}, {c.size} px' if c.size else c.name
        report(f"## {title}\n\nRecorded: {weights:,} weights in {k} of {k_all} parameters; {n} rounds. "
               f"Noise (median / minimum of the floor): {noise} threads.\n\n{case_table(got)}")
    if ('xresnet18',64) in res:
        report(f"## Targets for xresnet18\n\n{targets_table(res['xresnet18',64], res.get(('xresnet18',128), {}))}")
    report('## Scaling\n\nTime of `tensor_stats` on one thread. The floor is `sum()` of the same tensors.\n')
    for head,table in growth(3 if quick else max(3,rounds//2), 10**6 if quick else 3*10**7): report(f'{head}\n\n{table}')
    report(f'## Where the time goes\n\nTime of each loop over a chunk of {compiled.CHUNK:,} weights that is in the cache: '
           f'the minimum of {rounds} rounds on one thread. The times above also contain reading the weights from memory, and Python.'
           f'\n\n{parts(rounds)}')
    report(f'{(perf_counter()-start)/60:.1f} minutes.')
    if out: Path(out).write_text('\n'.join(text)+'\n')
