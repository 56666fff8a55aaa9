"""DataLoaders from images: folder layouts, damaged files, and repeatable batches"""
import numpy as np
import pytest
import torch
from fastai.data.transforms import Normalize
from PIL import Image

from fastai_bnstats.study import data
from fastai_bnstats.study.data import channel_stats, data_maker, digits, image_folders, pets_imagewoof, scan_images, seed_batches


def picture(path, seed=0, size=24):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size+4, 3), dtype=np.uint8)).save(path)


def folder(root, classes=('cat', 'dog'), n=6, valid='valid'):
    for part, k in (('train', n), (valid, 3)):
        for c in classes:
            for i in range(k): picture(root/part/c/f'{i}.png', i)
    return root


def flat(root, classes=('Abyssinian', 'great_pyrenees'), n=10):
    for c in classes:
        for i in range(n): picture(root/'images'/f'{c}_{i+1}.jpg', i)
    return root


def test_digits():
    d = digits()
    assert d.source.c == 6 and d.target.c == 4 and d.source.vocab == list('012345') and d.target.vocab == list('6789')
    assert (len(d.source.train_ds)+len(d.source.valid_ds)+len(d.target.train_ds)+len(d.target.valid_ds)) == 1797
    assert 5*len(d.target.train) >= 150
    x, y = d.source.one_batch()
    assert x.shape == (16, 3, 32, 32)
    mean, std = d.about['stats']
    for dls in (d.source, d.target): # both are normalised with the statistics of the source
        n = next(t for t in dls.train.after_batch if isinstance(t, Normalize))
        assert n.mean.flatten().tolist() == pytest.approx(mean) and n.std.flatten().tolist() == pytest.approx(std)
    train = {id(i[0]) for i in d.target.train_ds.items}
    assert d.about['target'] == dict(classes=list('6789'), train=len(d.target.train_ds), valid=len(d.target.valid_ds)) and len(train) > 500


def test_batches_depend_only_on_the_key():
    d = digits().target
    def epoch(*key):
        seed_batches(d, *key)
        return torch.cat([x for x, _ in d.train])
    a, b, c = epoch(1, 0, 0), epoch(1, 0, 0), epoch(1, 0, 1)
    assert a.equal(b) and not a.equal(c)


@pytest.mark.parametrize('valid', ['valid', 'val'])
def test_folders_of_classes(tmp_path, valid):
    train, val, skipped = scan_images(folder(tmp_path, valid=valid))
    assert len(train) == 12 and len(val) == 6 and not skipped and {c for _, c in train} == {'cat', 'dog'}


@pytest.mark.parametrize('sub', ['', 'images'])
def test_flat_folder_of_oxford_pets(tmp_path, sub):
    train, val, _ = scan_images(flat(tmp_path)/sub)
    assert len(train) == 16 and len(val) == 4 and {c for _, c in train} == {'Abyssinian', 'great_pyrenees'}
    assert scan_images(tmp_path)[1] == val # the same split every time


def test_a_broken_picture_is_named_and_skipped(tmp_path):
    folder(tmp_path)
    whole = tmp_path/'train/cat/1.jpg'
    picture(whole, 3, 200)
    whole.write_bytes(whole.read_bytes()[:2000]) # truncated
    (tmp_path/'train/dog/bad.png').write_bytes(b'')
    with pytest.warns(UserWarning, match=r"2 of 20 images in .* can't be read and are skipped: .*1.jpg.*bad.png"):
        train, _, skipped = scan_images(tmp_path)
    assert len(train) == 12 and len(skipped) == 2
    with pytest.warns(UserWarning): d = image_folders(tmp_path, tmp_path, size=16, bs=4)
    assert len(d.about['source']['skipped']) == 2


def test_loaders_from_folders(tmp_path):
    d = image_folders(folder(tmp_path/'a'), flat(tmp_path/'b'), size=16, bs=4)
    x, y = d.target.one_batch()
    assert x.shape == (4, 3, 16, 16) and d.target.vocab == ['Abyssinian', 'great_pyrenees'] and len(d.source.train) == 3
    seed_batches(d.target, 1); a = d.target.one_batch()[0]
    seed_batches(d.target, 1); assert a.equal(d.target.one_batch()[0])


def test_channel_statistics():
    ims = [Image.fromarray(np.full((4, 4, 3), v, np.uint8)) for v in (0, 255)]
    assert channel_stats(ims) == ([.5]*3, [.5]*3)


@pytest.mark.parametrize('make,text', [
    (lambda p: p/'nowhere', 'No folder .*nowhere. Expected a folder of images: train/CLASS'),
    (lambda p: p, 'No images in .* found an empty folder'),
    (lambda p: folder(p, classes=['cat']), r'has 1 class with training images \(cat\); a classifier needs at least 2'),
    (lambda p: (folder(p), [f.unlink() for f in (p/'valid/dog').iterdir()], p)[-1],
     'only one of training and validation: dog. Each class needs both'),
    (lambda p: (picture(p/'train'/'a'/'0.png'), p)[-1], 'has a folder train, but none called valid or val')])
def test_wrong_folders_are_refused(tmp_path, make, text):
    with pytest.raises((ValueError, FileNotFoundError), match=text): scan_images(make(tmp_path))


def test_wrong_sizes_are_refused(tmp_path):
    with pytest.raises(ValueError, match='at least 2 images.*at most the 12 .*Found bs=64'):
        image_folders(folder(tmp_path), tmp_path, size=16)
    with pytest.raises(ValueError, match='Found bs=1'): digits(bs=1)
    with pytest.raises(ValueError, match='at least 8 pixels a side. Found size=4'): digits(size=4)


def test_without_a_network(monkeypatch):
    def fails(url): raise OSError('Name or service not known')
    monkeypatch.setattr(data, 'untar_data', fails)
    with pytest.raises(ConnectionError, match=r'Could not fetch https://.*pet.*Name or service not known.*--source FOLDER --target FOLDER'):
        pets_imagewoof()


def test_names():
    assert data_maker('digits') is digits
    with pytest.raises(ValueError, match="Unknown data 'mnist'. Expected digits or pets-imagewoof"): data_maker('mnist')
    with pytest.raises(ValueError, match='go together.*Found only --source'): data_maker(source='a')
