"""Run fastai's own test notebooks without this library, after its import, and with its recorders attached to every learner

    git clone --depth 1 https://github.com/fastai/fastai
    python tests/peers/fastai_notebooks.py fastai/nbs                       # all notebooks of the table below
    python tests/peers/fastai_notebooks.py fastai/nbs 13a_learner 12_optimizer

A cell that passes without this library must pass with it; `EXPLAINED` lists the exceptions. The installed fastai is tested: its module
takes the place of the cells that a notebook exports. There is no network: small stand-ins replace the data sets, and random weights
replace pretrained ones. What needs more than that fails in all modes alike. Needs nbdev, with which execnb comes."""
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path

MODES = ['plain', 'import', 'record']
NOTEBOOKS = '''00_torch_core 01_layers 01a_losses 02_data.load 03_data.core 05_data.transforms 06_data.block 07_vision.core 08_vision.data
    09b_vision.utils 11_vision.models.xresnet 12_optimizer 13_callback.core 13a_learner 13b_metrics 14_callback.schedule
    14a_callback.data 15_callback.hook 15a_vision.models.unet 16_callback.progress 17_callback.tracker 18_callback.fp16
    18a_callback.training 18b_callback.preds 18c_callback.channelslast 19_callback.mixup 20_interpret 21_vision.learner 24_vision.gan
    31_text.data 32_text.models.awdlstm 33_text.models.core 34_callback.rnn 37_text.learner 40_tabular.core 41_tabular.data
    42_tabular.model 43_tabular.learner 45_collab 97_test_utils 98_test_model_export'''.split()
EXPLAINED = {'learn.cbs), ': 'it counts the callbacks of a learner'} # text in the cell -> why recorders change its result
WARNED = {'19_callback.mixup': 'it calls events of a training that never began, so that minibatches have no number'} # recording stops
SKIPPED = {'slow', 'cuda', 'multicuda', 'cpp'} # as fastai's own settings do; `eval: false` too
SETUP = {'13a_learner': 'defaults.callbacks = [TrainEvalCallback]'} # other modules of fastai have added to it


@lru_cache(1)
def stand_ins():
    "A folder of small data sets, in the places and formats of fastai's"
    tmp = tempfile.TemporaryDirectory()
    make_data(Path(tmp.name))
    return tmp


def make_data(folder):
    import numpy as np
    import pandas as pd
    from PIL import Image
    from sklearn.datasets import load_digits
    digits = load_digits()
    for name in ('mnist_tiny', 'mnist_sample'):
        root, rows = folder/'data'/name, []
        for label in (3, 7):
            for i, x in enumerate(digits.images[digits.target == label]):
                path = f'{"valid" if i%3 == 0 else "train"}/{label}/{i}.png'
                (root/path).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray((x*15.9).astype('uint8')).resize((28, 28)).save(root/path)
                rows.append((path, label))
        (root/'test').mkdir()
        shutil.copy(root/path, root/'test'/'0.png')
        (root/'models').mkdir()
        pd.DataFrame(rows, columns=['name', 'label']).to_csv(root/'labels.csv', index=False)
    pets = folder/'data'/'oxford-iiit-pet'/'images'
    pets.mkdir(parents=True)
    for i, (x, y) in enumerate(zip(digits.images[:100], digits.target[:100], strict=True)):
        name = f'{"Bengal" if y == 0 else f"breed_{y}"}_{i}.jpg'
        Image.fromarray((x*15.9).astype('uint8')).convert('RGB').resize((64, 64)).save(pets/name)
    rng, n = np.random.default_rng(0), 1200
    kinds = dict(workclass=['Private', 'State-gov', 'Self-emp-inc'], education=['Bachelors', 'HS-grad', 'Masters', 'Some-college'],
                 relationship=['Husband', 'Wife', 'Own-child'], occupation=['Sales', 'Tech-support', 'Adm-clerical'],
                 race=['White', 'Black', 'Other'], sex=['Male', 'Female'], salary=['<50k', '>=50k'])
    kinds |= {'marital-status': ['Married', 'Divorced', 'Never-married'], 'native-country': ['United-States', 'Mexico', 'India']}
    ranges = {'age': (17, 90), 'fnlwgt': (12_000, 500_000), 'education-num': (1, 16), 'capital-gain': (0, 9_000),
              'capital-loss': (0, 900), 'hours-per-week': (1, 99)}
    adult = pd.DataFrame({k: rng.choice(v, n) for k, v in kinds.items()} | {k: rng.integers(*r, n) for k, r in ranges.items()})
    adult.loc[::50, 'education-num'] = np.nan
    films = pd.DataFrame(dict(userId=rng.integers(1, 40, n), movieId=rng.integers(1, 60, n), rating=rng.integers(1, 11, n)/2,
                              timestamp=rng.integers(10**9, 1.1*10**9, n)))
    words = 'the a film plot was is bad good very xxunk great boring and of in it I'.split()
    texts = pd.DataFrame(dict(label=rng.choice(['positive', 'negative'], n), text=[' '.join(rng.choice(words, 30)) for _ in range(n)],
                              is_valid=rng.random(n) < .2))
    for name, file, df in (('adult_sample', 'adult.csv', adult), ('movie_lens_sample', 'ratings.csv', films),
                           ('imdb_sample', 'texts.csv', texts)):
        (folder/'data'/name).mkdir()
        df.to_csv(folder/'data'/name/file, index=False)


def offline():
    "Fail at once where a cell asks for the network, and use random weights instead of pretrained ones"
    import socket

    import torchvision
    def fail(host, *args, **kwargs): raise OSError(f'There is no network here, so {host} can not be reached.')
    socket.getaddrinfo = fail
    def random_weights(self, *args, **kwargs): # of the model after which the weights are named
        return torchvision.models.get_model(type(self).__name__.removesuffix('_Weights').lower()).state_dict()
    torchvision.models._api.WeightsEnum.get_state_dict = random_weights


def attach_recorders():
    "Give every learner the four recorders, as long as its model has something for them to record"
    from fastai.learner import Learner

    from fastai_bnstats.all import ActivationHistCallback, GradHistCallback, UpdateHistCallback, WeightHistCallback
    plain = Learner.__init__
    def init(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        for cls in (WeightHistCallback, GradHistCallback, UpdateHistCallback, ActivationHistCallback):
            cb = cls(layers='all')
            try: cb.tensors(self.model)
            except Exception as e: print(f'{cls.__name__} is not attached: {e}', file=sys.__stderr__)
            else: self.add_cb(cb); ATTACHED.append(cb)
    init.__wrapped__ = plain # so that the signature stays
    Learner.__init__ = init


ATTACHED = []


def cells(notebook):
    "The source of each cell to run, and is it exported?"
    for cell in json.loads(notebook.read_text())['cells']:
        source = ''.join(cell['source'])
        flags = {f.strip() for f in re.findall(r'^#\s*\|\s*(.*)$', source, re.M)}
        words = {f.split()[0] for f in flags if f}
        if cell['cell_type'] != 'code' or words & SKIPPED or 'eval: false' in flags or 'nbdev_export' in source: continue
        if source.strip(): yield source, bool(words & {'export', 'exports', 'exporti'})


def with_installed(notebook):
    "The cells, with the installed module in the place of the first that is exported; of the others, only settings remain"
    module, sources = re.search(r'"#\s*\|\s*default_exp\s+([\w.]+)', notebook.read_text()), []
    take = f"import fastai.{module and module[1]} as _m; globals().update({{k: v for k, v in vars(_m).items() if k[:2] != '__'}})"
    taken = False
    for source, exported in cells(notebook):
        if exported and not taken: source = f'{take}; {SETUP.get(notebook.stem, "")}'
        elif exported: source = '\n'.join(line for line in source.splitlines() if re.match(r'(if .*: )?defaults\.', line))
        taken |= exported
        if source: sources.append(source)
    return sources


def run_notebook(notebook, mode):
    "Run all cells in this process; the number of cells, those that failed, and the warnings of this library"
    from execnb.shell import CaptureShell
    if mode != 'plain': import fastai_bnstats.all # noqa: F401
    if mode == 'record': attach_recorders()
    heard, show = [], warnings.showwarning
    def listen(message, *args, **kwargs):
        if re.match(r'\w+HistCallback|Not recorded', str(message)): heard.append(str(message))
        show(message, *args, **kwargs)
    warnings.showwarning = listen
    shell, failed, sources = CaptureShell(mpl_format=None), {}, with_installed(notebook)
    for i, source in enumerate(sources):
        shell.run(source)
        if shell.exc: failed[i] = [source, f'{type(shell.exc).__name__}: {shell.exc}']
    rows = [len(cb.recording) for cb in ATTACHED if cb.writer is not None]
    return dict(cells=len(sources), failed=failed, warnings=heard, recordings=len(rows), rows=sum(rows))


def child(notebook, mode, tmp):
    home, work = tmp/'home', tmp/'nbs'
    shutil.copytree(stand_ins().name, home)
    shutil.copytree(notebook.parent, work, ignore=lambda d, names: [n for n in names if n == 'examples' or n.endswith('.ipynb')])
    os.chdir(work)
    os.environ |= {'FASTAI_HOME': str(home), 'TORCH_HOME': str(home), 'HF_HUB_OFFLINE': '1', 'MPLBACKEND': 'agg'}
    log = os.open(tmp/'log', os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1); os.dup2(log, 2)
    warnings.resetwarnings() # under pytest they are errors
    offline()
    (tmp/'result.json').write_text(json.dumps(run_notebook(notebook, mode)))
    os._exit(0) # without waiting for what cells left running


def results(notebook, limit=900):
    "Mode -> what `run_notebook` gives, each in a process and a copy of the folder of its own"
    import execnb.shell # noqa: F401
    import fastai.basics # noqa: F401
    import torch
    import torchvision # noqa: F401
    torch.set_num_threads(1)
    stand_ins()
    res = {}
    for mode in MODES:
        with tempfile.TemporaryDirectory() as tmp:
            p = multiprocessing.get_context('fork').Process(target=child, args=(notebook.absolute(), mode, Path(tmp)))
            p.start()
            p.join(limit)
            p.kill()
            out = Path(tmp)/'result.json'
            if not out.exists(): raise RuntimeError(f'{notebook.name} ended early, mode {mode}: {(Path(tmp)/"log").read_text()[-2000:]}')
            res[mode] = json.loads(out.read_text())
    return res


def explained(source): return next((why for text, why in EXPLAINED.items() if text in source), None)


def new_failures(res, mode):
    "Cells that fail only with this library: (source, error, explanation or None)"
    new = {i: e for i, e in res[mode]['failed'].items() if i not in res['plain']['failed']}
    return [(source, error, explained(source) if mode == 'record' else None) for source, error in new.values()]


def main(folder, *names):
    total = dict(notebooks=0, cells=0, plain=0, imported=0, record=0, explained=0, recordings=0, rows=0)
    print('notebook | cells | fail plain | only after import | only with recorders (explained) | recordings, rows')
    for name in names or NOTEBOOKS:
        res = results(Path(folder)/f'{name}.ipynb')
        imported, record = new_failures(res, 'import'), new_failures(res, 'record')
        why = [w for *_, w in record if w]
        rec = res['record']
        row = (1, res['plain']['cells'], len(res['plain']['failed']), len(imported), len(record), len(why), rec['recordings'], rec['rows'])
        for k, v in zip(total, row): total[k] += v
        print(f'{name} | {row[1]} | {row[2]} | {row[3]} | {row[4]} ({row[5]}) | {row[6]}, {row[7]}', flush=True)
        for source, error, w in imported+record:
            if not w: print(f'    {error[:300]}\n        ' + source.replace('\n', '\n        ')[:1500], flush=True)
        for w in sorted({re.sub(r'\d+', '#', w) for w in rec['warnings']}): print(f'    warning: {w[:300]}', flush=True)
        if os.environ.get('VERBOSE'):
            for source, error in res['plain']['failed'].values(): print(f'    plain: {error[:160]!r} in {source[:100]!r}', flush=True)
    print(total)


if __name__ == '__main__': main(*sys.argv[1:])
