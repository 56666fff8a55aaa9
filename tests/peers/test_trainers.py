"""The trainers of Hugging Face and Lightning: `Ledger` proves what moved, `record` records, and neither changes the training"""
import numpy as np
import pytest
import torch
from fastai.basics import nn

from fastai_bnstats.freeze import Ledger, LedgerError
from fastai_bnstats.record import record

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings('ignore')] # they warn of each other's changes


def bert():
    from transformers import BertConfig, BertForSequenceClassification
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                                    intermediate_size=32, max_position_embeddings=12, num_labels=2))


def with_lora():
    from peft import LoraConfig, get_peft_model
    return get_peft_model(bert(), LoraConfig(r=2, target_modules=['query', 'value'], task_type='SEQ_CLS'))


def hugging_face(model, folder, callbacks=None, steps=4, **kwargs):
    from transformers import Trainer, TrainingArguments
    g = torch.Generator().manual_seed(1)
    data = [dict(input_ids=torch.randint(0, 40, (8,), generator=g), labels=torch.tensor(i % 2)) for i in range(32)]
    args = TrainingArguments(str(folder), max_steps=steps, per_device_train_batch_size=8, learning_rate=1e-2, report_to='none', seed=1,
                             save_strategy='no', use_cpu=True, logging_strategy='no', disable_tqdm=True, **kwargs)
    return Trainer(model, args, train_dataset=data, callbacks=callbacks)


def test_only_the_matrices_of_lora_and_the_head_moved(tmp_path):
    model = with_lora()
    trainer = hugging_face(model, tmp_path)
    with Ledger(model, trains=['*lora_*', '*modules_to_save*']) as led, record(model, layers='*lora_*') as rec: trainer.train()
    moved = set(led.table.index[led.table.found == 'moved'])
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad} and len(moved) == 10 and not len(led.broken)
    for r, n in ((rec.weights, 8), (rec.gradients, 8), (rec.updates, 8)):
        assert len(r) == 4 and len(r.names) == n and r.meta['trained'] == {'0': [10, 51]}
    params = dict(model.named_parameters())
    assert np.allclose(rec.weights.mean[-1], [params[n].detach().double().mean().item() for n in rec.weights.names], rtol=1e-12)
    is_a, moved = np.array(['lora_A' in n for n in rec.updates.names]), rec.updates.step_norm > 0
    assert moved[1:].all() and (moved[0] == ~is_a).all() # the matrices B begin at zero, so A has no gradient in the first step
    assert (np.diff(rec.weights.lr[:, 0]) < 0).all() # the trainer lowers the rate


def test_a_ledger_finds_a_weight_that_a_callback_of_the_trainer_changes(tmp_path):
    from transformers import TrainerCallback
    model = with_lora()
    name, weight = next((n, p) for n, p in model.named_parameters() if 'word_embeddings' in n)
    class Write(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs): weight.data.mul_(1.001)
    with pytest.raises(LedgerError, match='your own code changed it') as e, Ledger(model) as led:
        hugging_face(model, tmp_path, [Write()]).train()
    assert list(led.broken.index) == [name] and name in str(e.value)


def test_neither_changes_the_training_of_hugging_face(tmp_path):
    trained = []
    for watched in (False, True):
        model = with_lora()
        trainer = hugging_face(model, tmp_path, gradient_accumulation_steps=2, max_grad_norm=.1)
        if watched:
            with Ledger(model), record(model) as rec: trainer.train()
        else: trainer.train()
        trained.append(model.state_dict())
    assert all(a.equal(b) for a, b in zip(*(t.values() for t in trained), strict=True)) and len(rec.weights) == 4
    last = rec.gradients.sel(step=-1)
    norm = np.sqrt(np.nansum((last.var+last.mean**2)*last.numel)) # without the biases, which are not recorded
    assert 0 < norm <= .1+1e-6 # clipped


def lightning_model():
    from lightning import LightningModule
    class Net(LightningModule):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU()), nn.Linear(8, 2)
        def training_step(self, batch, i): return nn.functional.cross_entropy(self.head(self.body(batch[0])), batch[1])
        def configure_optimizers(self): return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 1e-2)
    torch.manual_seed(0)
    return Net()


def lightning(model, **kwargs):
    from lightning import Trainer
    g = torch.Generator().manual_seed(1)
    xs, ys = torch.randn(64, 4, generator=g), torch.randint(0, 2, (64,), generator=g)
    dl = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(xs, ys), batch_size=16)
    Trainer(max_epochs=2, accelerator='cpu', logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, **kwargs).fit(model, dl)


def test_lightning():
    plain, model = lightning_model(), lightning_model()
    for m in (plain, model): m.body.requires_grad_(False)
    lightning(plain, gradient_clip_val=.01)
    with Ledger(model) as led, record(model) as rec: lightning(model, gradient_clip_val=.01)
    assert all(a.equal(b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))
    assert led.summary() == 'frozen: 4 identical; may move: 3 moved; trains: 2 moved'
    assert rec.weights.names.tolist() == ['body.0.weight', 'head.weight'] and len(rec.weights) == 8
    assert (rec.gradients.numel[:, 0] == 0).all() # frozen
    rms = rec.gradients.rms[:, 1]*np.sqrt(16)
    assert ((rms > 0) & (rms <= .01+1e-8)).all() # computed in a closure, and clipped
    with pytest.raises(LedgerError, match='put their layer in eval mode'), Ledger(model, trains='head.*'): lightning(model)
