"""What it costs to record weights: one run, in which ours, a floor, a training step and other libraries take turns

    pip install '.[bench]' && python benchmarks/overhead.py --out overhead.md"""

import importlib.metadata,os,platform,random,tempfile
from collections import namedtuple
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from fastai.vision.all import *
from fastai.callback.hook import ActivationStats
from fastcore.script import CliError,call_parse

from fastai_bnstats.record import WeightHistCallback
from fastai_bnstats.record import choose_bins,select_tensors
from fastai_bnstats.measure import CHUNK,auto_range,binning,tensor_stats,uniform_edges

BINS = 40
STEP,FLOOR,STATS,CALLBACK,ACTS = 'training step','floor: `sum()` of each tensor','ours: `tensor_stats`','ours: `WeightHistCallback`','fastai `ActivationStats(with_hist=True)`'
POST,NUMPY,BOARD,WANDB = 'loop of `histc`, `mean`, `var`','`numpy.histogram`, `mean`, `var`','TensorBoard `add_histogram`',"wandb offline, `watch(log='parameters', log_freq=1)`"
METHODS = [STEP, FLOOR, STATS, CALLBACK, POST, NUMPY, BOARD, WANDB, ACTS]

# --- what is trained
Case = namedtuple('Case', 'name size more') # pixels; how many times the rounds
CASES = [Case('xresnet18',64,1), Case('xresnet18',128,.5), Case('xresnet50',64,.5), Case('mlp',None,20)]

def new_learner(case, n, cbs):
    "Learner whose epoch is `n` times the same batch of 64 random samples of 10 classes"
    set_seed(0)
    if case.size: model,x = globals()[case.name](n_out=10),torch.randn(64,3,case.size,case.size)
    else: model,x = nn.Sequential(nn.Linear(20,64), nn.ReLU(), nn.Linear(64,40), nn.ReLU(), nn.Linear(40,10)),torch.randn(64,20)
    y = torch.randint(10, (64,))
    return Learner(DataLoaders(*(DataLoader([(x,y)]*k, bs=None) for k in (n,1))), model, loss_func=CrossEntropyLossFlat(), cbs=cbs)

# --- ways to record, as functions to call after a batch
def own_ways(tensors):
    "What needs torch and numpy alone"
    ws,binnings = [t for _,t,_ in tensors],choose_bins(tensors, BINS)
    ends = [(g.edges[0].item(), g.edges[-1].item()) for g in binnings]
    def floor():
        for w in ws: w.sum()
    def post(): return [(w.histc(BINS,*r), w.mean(), w.var()) for w,r in zip(ws,ends)]
    def with_numpy(): return [(np.histogram(a,BINS,r), a.mean(), a.var()) for a,r in zip([w.detach().numpy() for w in ws], ends)]
    return {FLOOR:floor, STATS:lambda: tensor_stats(ws, binnings), POST:post, NUMPY:with_numpy}

def board_way(tensors, stack):
    "TensorBoard's default histogram of the same tensors"
    from torch.utils.tensorboard import SummaryWriter
    writer = SummaryWriter(stack.enter_context(tempfile.TemporaryDirectory()))
    stack.callback(writer.close)
    def board():
        for n,t,_ in tensors: writer.add_histogram(n, t)
    return board

def wandb_way(model, stack):
    "wandb's own forward hook, which logs all parameters of the model, batch norm's and biases too, and the `log` that ends a step"
    folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
    os.environ |= {f'WANDB_{k}_DIR':folder for k in ('CACHE','CONFIG','DATA','ARTIFACT')} | {'WANDB_MODE':'offline', 'WANDB_ERROR_REPORTING':'false', 'WANDB_SILENT':'true'}
    import wandb # reads the environment
    quiet = wandb.Settings(silent=True, console='off', save_code=False, disable_git=True, x_disable_meta=True, x_disable_stats=True, x_disable_machine_info=True)
    run = wandb.init(mode='offline', dir=folder, settings=quiet)
    stack.callback(run.finish)
    before = set(model._forward_hooks)
    run.watch(model, log='parameters', log_freq=1)
    hook, = [h for i,h in model._forward_hooks.items() if i not in before]
    stack.callback(run.unwatch, model)
    for i in set(model._forward_hooks)-before: del model._forward_hooks[i] # called from here, and not in the training step that is timed
    def watch():
        hook(model, (), None)
        run.log({'loss':0.})
    return watch

def installed(*names):
    "Those of `names` that can be imported"
    res = []
    for n in names:
        try: res.append((n, importlib.metadata.version(n)))
        except importlib.metadata.PackageNotFoundError: pass
    return dict(res)

# --- the clocks
def ms_of(f):
    start = perf_counter()
    f()
    return (perf_counter()-start)*1000

def in_turn(ways, k):
    "Milliseconds of each of `ways`, in another order for each `k`, so that none always finds what the same other left in the caches"
    return {n:ms_of(ways[n]) for n in random.Random(k).sample(list(ways), len(ways))}

class Timed(WeightHistCallback):
    "`WeightHistCallback` which counts the seconds spent in all its events"
    spent = 0.
    def __call__(self, event_name):
        start = perf_counter()
        try: return super().__call__(event_name)
        finally: self.spent += perf_counter()-start

def acts_ms(learn, modules):
    "Milliseconds of `ActivationStats` in a forward pass: hooks before and after its own read the clock, and its `after_batch` is added"
    cb,spent,start = ActivationStats(with_hist=True, modules=modules),0.,0.
    cb.learn = learn
    def begin(*_):
        nonlocal start
        start = perf_counter()
    def end(*_):
        nonlocal spent
        spent += perf_counter()-start
    first = [m.register_forward_hook(begin) for m in modules]
    cb.before_fit()
    last = [m.register_forward_hook(end) for m in modules]
    learn.model(*learn.xb)
    res = spent*1000+ms_of(cb.after_batch)
    for h in first+last: h.remove()
    cb.after_fit()
    return res

class Rounds(Callback):
    "Each batch of a fit is trained with one of `threads`, and timed; then all ways of recording are timed, in turn"
    order,run_valid = 100,False
    def __init__(self, timed, threads, ways, modules): store_attr(); self.got = {t:[] for t in threads}
    def before_batch(self):
        self.n_threads = self.threads[self.iter%len(self.threads)]
        torch.set_num_threads(self.n_threads)
        self.spent,self.start = self.timed.spent,perf_counter()
    def after_batch(self):
        whole,ours = perf_counter()-self.start,self.timed.spent-self.spent
        with torch.no_grad(): ms = in_turn(self.ways, self.iter//len(self.threads))
        self.got[self.n_threads].append({STEP:(whole-ours)*1000, CALLBACK:ours*1000, **ms, ACTS:acts_ms(self.learn, self.modules)})

def measure(case, rounds, threads, peers):
    "Milliseconds {threads: {method: [one a round]}} in a real fit, and what was recorded"
    n = max(3, round(rounds*case.more))
    timed = Timed(bins=BINS)
    learn = new_learner(case, (n+1)*len(threads), [timed])
    tensors = select_tensors(learn.model)
    with ExitStack() as stack:
        ways = own_ways(tensors)
        if 'tensorboard' in peers: ways[BOARD] = board_way(tensors, stack)
        if 'wandb' in peers: ways[WANDB] = wandb_way(learn.model, stack)
        cb = Rounds(timed, threads, ways, [m for *_,m in tensors])
        was = torch.get_num_threads()
        try:
            with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-4, cbs=cb)
        finally: torch.set_num_threads(was)
    if len(timed.recording)!=len(learn.dls.train): raise CliError(f"The callback recorded {len(timed.recording)} of {len(learn.dls.train)} batches: its times mean nothing.")
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
            rows.append([m, str(t), med, min(ms[m]), med/floor, 100*med/step, '' if m in METHODS[:4] else med/ours])
    return md(['method', 'threads', 'ms a batch', 'its minimum', 'times the floor', '% of the step', 'times our callback'], rows)

def targets_table(res):
    "The targets are those of xresnet18; shares and the floor are counted at one thread"
    g64,g128 = (res.get(('xresnet18',s)) for s in (64,128))
    rows = []
    def add(name, g, asked, of, faster=False):
        for t in g or {}:
            ratio = lambda ours,stat: stat(g[t][of])/stat(g[t][ours]) if faster else stat(g[t][ours])/stat(g[1][of])*(1 if of==FLOOR else 100)
            say = lambda v: f"{v:.3g}, {'met' if (v>=asked if faster else v<=asked) else 'missed'}"
            if of in g[t]: rows.append([name, str(t), f"{'≥' if faster else '≤'} {asked}", *(say(ratio(o,np.median)) for o in (STATS,CALLBACK)), ratio(CALLBACK,min)])
    add('times the floor', g64, 5, FLOOR)
    add('% of a step of 64 px', g64, 2, STEP)
    add('% of a step of 128 px', g128, .5, STEP)
    for of,asked in ((POST,3), (BOARD,8), (WANDB,10), (ACTS,10)): add(f'times faster than {of}', g64, asked, of, faster=True)
    return md(['target', 'threads', 'asked', '`tensor_stats`', 'whole callback', 'callback, by minima'], rows)

# --- how ours grows
def growth(rounds, n_max):
    "Tables of what `tensor_stats` takes at one thread, beside the floor, by weights, by tensors and by bins"
    def case(n, k, bins):
        ws = [w.clone() for w in torch.randn(n, generator=torch.Generator().manual_seed(0)).mul(.02).chunk(k)]
        gs = [binning(uniform_edges(*auto_range(ws[0]), bins))]*k
        def floor():
            for w in ws: w.sum()
        return lambda: tensor_stats(ws, gs), floor
    def table(head, cases):
        ways = {}
        for c in cases: ways[c,'ours'],ways[c,'floor'] = case(*c)
        with torch.no_grad(): got = [in_turn(ways, k) for k in range(rounds+1)][1:]
        ms = {w:np.median([g[w] for g in got]) for w in ways}
        return md([head, 'ms', 'times the floor', 'ns a weight'], [[f'{x:,}', ms[c,'ours'], ms[c,'ours']/ms[c,'floor'], 1e6*ms[c,'ours']/c[0]]
                                                                    for c,x in zip(cases, [c[('weights','tensors','bins').index(head)] for c in cases])])
    was,n = torch.get_num_threads(),n_max//10
    torch.set_num_threads(1)
    try:
        yield f'With the weights of one tensor ({BINS} bins):', table('weights', [(int(m),1,BINS) for m in (1e4,3e4,1e5,3e5,1e6,3e6,1e7,3e7) if m<=n_max])
        yield f'With the number of tensors into which {n:,} weights are cut ({BINS} bins):', table('tensors', [(n,k,BINS) for k in (1,3,10,30,100,300,1000)])
        yield f'With the number of bins ({n:,} weights in one tensor):', table('bins', [(n,1,b) for b in (10,20,40,80,160,200,320,500)])
    finally: torch.set_num_threads(was)

def parts(rounds):
    "Table of what the operations on one chunk of `tensor_stats` take, each alone, in their order"
    x = torch.randn(CHUNK, generator=torch.Generator().manual_seed(0)).mul(.02)
    g,K,h = binning(uniform_edges(*auto_range(x[None]), BINS)),BINS+2,CHUNK//2
    f,q,k,shift = torch.empty(CHUNK),torch.empty(CHUNK, dtype=torch.int16),torch.empty(h, dtype=torch.int16),torch.tensor(g.shift)
    ways = {'bin: `add(shift, x, alpha=scale)`':lambda: torch.add(shift, x, alpha=g.scale, out=f), 'sum':x.sum, 'sum of squares: `dot`':lambda: x.dot(x),
            'to 16 bits':lambda: q.copy_(f), 'clamp':lambda: q.clamp_(0,K-1), 'pairs':lambda: torch.add(q[h:], q[:h], alpha=K, out=k), '`bincount` of pairs':lambda: torch.bincount(k, minlength=K*K)}
    was = torch.get_num_threads()
    torch.set_num_threads(1)
    try: got = [in_turn(ways, k) for k in range(20*rounds)]
    finally: torch.set_num_threads(was)
    ns = {m:1e6*min(r[m] for r in got)/CHUNK for m in ways}
    return md(['operation', 'ns a weight'], [*ns.items(), ('all of them',sum(ns.values()))])

def cpu_model():
    info = Path('/proc/cpuinfo')
    names = [l.split(':')[1].strip() for l in info.read_text().splitlines() if l.startswith('model name')] if info.exists() else []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"

@call_parse
def main(
    models:str='xresnet18,xresnet50,mlp', # models to train
    threads:str='1,2', # numbers of torch threads; 1 always comes along, since floor and step are counted at one
    rounds:int=12, # rounds of xresnet18 at 64 px; half as many of the larger cases, 20 times as many of the MLP
    quick:bool=False, # 3 rounds, xresnet18 at 64 px and the MLP, smaller tensors: does it run?
    peers:bool=True, # leave TensorBoard and wandb out
    out:str=None, # write the report there, too
):
    "Measure what recording weights costs, and print it as Markdown"
    names,ts = models.split(','),list(dict.fromkeys([1]+[int(t) for t in threads.split(',')]))
    if bad := set(names)-{c.name for c in CASES}: raise CliError(f"Unknown model {', '.join(sorted(bad))}. The models are {', '.join(dict.fromkeys(c.name for c in CASES))}.")
    if rounds<1 or min(ts)<1: raise CliError(f"--rounds and --threads take numbers of at least 1. Found --rounds {rounds} --threads {threads}.")
    cases = [c for c in CASES if c.name in names and not (quick and (c.size==128 or c.name=='xresnet50'))]
    if quick: rounds = 3
    there = installed('tensorboard', 'wandb') if peers else {}
    start,text,res = perf_counter(),[],{}
    def say(s):
        text.append(s)
        print(s, flush=True)
    versions = ', '.join(f'{p} {v}' for p,v in (installed('torch', 'fastai', 'numpy')|there).items())
    say(f"# What recording weights costs\n\n{date.today()}. {cpu_model()}. Python {platform.python_version()}, {versions}. {rounds} rounds.\n\n"
        f"Each batch of a real fastai fit (64 random samples; forward, backward, Adam) is timed, and after it every way of recording in turn; medians over the rounds, which take "
        f"the numbers of threads in turn too. Recorded are the weights of convolutions and linear layers: {BINS} bins, mean and variance. "
        "The floor, which times are divided by, is one read of all these weights at one thread, and shares are of the training step at one thread. "
        "`WeightHistCallback` is the time of all its events in a batch, the loss included. `ActivationStats` is the time of its hooks on the same modules, in a forward pass "
        "in training mode, and of its `after_batch`. wandb's hook logs all parameters, as it does for everyone; the `run.log` that ends the step is included. "
        "Ratios belong to one run; milliseconds do not carry over to another machine. Where the noise below is well above 1, other processes were running: repeat.\n")
    if peers:
        for p in ('tensorboard','wandb'):
            if p not in there: say(f"{p} is not installed and left out: `pip install '.[bench]'`.\n")
    for c in cases:
        got,n,weights,k,k_all = measure(c, rounds, ts, there)
        res[c.name,c.size] = got
        noise = ', '.join(f"{np.median(ms[FLOOR])/min(ms[FLOOR]):.2g} at {t}" for t,ms in got.items())
        say(f"## {c.name}{f', {c.size} px' if c.size else ''}\n\n{weights:,} weights in {k} tensors, of {k_all} parameters; {n} rounds. "
            f"Noise, as median / minimum of the floor: {noise} threads.\n\n{case_table(got)}")
    if any(name=='xresnet18' for name,_ in res): say(f"## Targets, for xresnet18\n\n{targets_table(res)}")
    say("## How ours grows\n\n`tensor_stats` at one thread; the floor is `sum()` of the same tensors.\n")
    for head,table in growth(3 if quick else max(3,rounds//2), 10**6 if quick else 3*10**7): say(f'{head}\n\n{table}')
    say(f"## Where the time goes\n\nEach operation on a chunk of {CHUNK:,} weights, alone and in the cache, by the minimum of {20*rounds} rounds at one thread. What is missing to the times above is reading the weights from memory, and Python.\n\n{parts(rounds)}")
    say(f'{(perf_counter()-start)/60:.1f} minutes.')
    if out: Path(out).write_text('\n'.join(text)+'\n')
