"Fine-tune in several processes: torchrun --standalone --nproc_per_node=2 two_processes.py"
from fastai.vision.all import *
from fastai.distributed import *
from fastai_bnstats.all import *

on_cpu = not torch.cuda.is_available()
if on_cpu:
    @patch
    def _broadcast(self:DistributedDL, t, rank): # fastai's own needs a GPU
        t = tensor(t)
        torch.distributed.broadcast(t, rank)
        return t.tolist()

set_seed(0)
body = nn.Sequential(ConvLayer(3, 8, stride=2), ConvLayer(8, 16, stride=2))
head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
learn = Learner(digits(bs=32, size=16).target, nn.Sequential(body, head), loss_func=CrossEntropyLossFlat(),
                cbs=[WeightHistCallback('all'), GradHistCallback(path='grads'), LedgerCallback()])

learn.freeze_non_bn(bn_stats='hold')
with learn.distrib_ctx(sync_bn=not on_cpu, cpu=on_cpu), learn.no_bar(), learn.no_logging():
    learn.fit_one_cycle(4, 5e-2)

print(f'rank {rank_distrib()}: {learn.ledger.summary()}')
if not rank_distrib(): learn.weight_hist.recording.save('weights.npz')
teardown_distrib()
