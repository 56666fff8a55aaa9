"""DataLoaders from images: folder layouts, damaged files, and repeatable batches"""
import os
import warnings

import numpy as np
import pytest
import torch
from fastai.data.transforms import Normalize
from PIL import Image, ImageFile

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
    assert 5*len(d.target.train) >= 80
    x, y = d.source.one_batch()
    assert x.shape == (32, 3, 32, 32)
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


def warnings_of(f):
    "The result of a call and the text of its warnings"
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        res = f()
    return res, '\n'.join(str(w.message) for w in ws)


def test_a_class_whose_name_begins_with_a_dot_is_named(tmp_path):
    folder(tmp_path, classes=('cat', 'dog', '.fox'))
    (tmp_path/'train/cat/.hidden').mkdir() # without images: nothing to say
    (train, _, skipped), text = warnings_of(lambda: scan_images(tmp_path))
    assert {c for _, c in train} == {'cat', 'dog'} and not skipped
    assert text == (f'In {tmp_path}: Folders whose name begins with a dot are left out. Rename them if they are classes: '
                    'train/.fox, valid/.fox')


LINKS = { # name of a link in a folder of images, and what it leads to
    'to the root': ('train/cat/again', ''), 'to train': ('train/cat/again', 'train'), 'to its class': ('train/cat/again', 'train/cat'),
    'to another class': ('train/cat/again', 'train/dog'),
    'a class twice': ('train/kitten', 'train/cat'), 'to itself': ('train/me', 'train/me')}


@pytest.mark.parametrize('link,target', LINKS.values(), ids=LINKS)
def test_a_link_that_leads_back_adds_no_images(tmp_path, link, target):
    folder(tmp_path)
    (tmp_path/link).symlink_to(tmp_path/target)
    (train, valid, _), text = warnings_of(lambda: scan_images(tmp_path))
    assert len(train) == 12 and len(valid) == 6 and all(c == f.parent.name for f, c in train)
    assert (f'Links that lead back into the folder are not followed. Put copies of the images there if they belong there: {link}' in text
            or link == target)


def test_links_to_folders_elsewhere_are_followed_once(tmp_path):
    "Also if they lead to each other"
    root, store = folder(tmp_path/'data'), folder(tmp_path/'store', classes=('fox', 'hen'))
    for part in ('train', 'valid'): (root/part/'fox').symlink_to(store/part/'fox')
    (store/'train/fox/hens').symlink_to(store/'train/hen')
    (store/'train/hen/foxes').symlink_to(store/'train/fox')
    (train, _, _), text = warnings_of(lambda: scan_images(root))
    assert [c for _, c in train] == ['cat']*6+['dog']*6+['fox']*12 and 'not followed' in text and 'train/fox/hens/foxes' in text


def test_a_named_pipe_is_skipped(tmp_path):
    folder(tmp_path)
    os.mkfifo(tmp_path/'train/cat/pipe.png')
    (train, _, skipped), text = warnings_of(lambda: scan_images(tmp_path))
    assert len(train) == 12 and skipped == [str(tmp_path/'train/cat/pipe.png')] and "1 of 19 images" in text and "can't be read" in text


def test_a_class_without_a_usable_image_is_named(tmp_path):
    folder(tmp_path, classes=('cat', 'dog', 'fox'))
    for f in tmp_path.rglob('fox/*'): f.write_bytes(b'broken')
    (train, _, skipped), text = warnings_of(lambda: scan_images(tmp_path))
    assert {c for _, c in train} == {'cat', 'dog'} and len(skipped) == 9
    assert f'These classes in {tmp_path} have no image that can be used, and are left out: fox. Replace their images' in text


def test_16_bits_are_scaled_to_8(tmp_path):
    deep = np.linspace(0, 65535, 24*24).reshape(24, 24).astype(np.uint16)
    for part in ('train', 'valid'):
        for c in ('a', 'b'):
            (tmp_path/part/c).mkdir(parents=True)
            for i in range(4): Image.fromarray(deep).save(tmp_path/part/c/f'{i}.png')
    d = image_folders(tmp_path, tmp_path, size=16, bs=4)
    assert d.about['stats'][0] == pytest.approx([.5]*3, abs=.02) and d.about['stats'][1] == pytest.approx([.29]*3, abs=.02)
    shown = np.asarray(d.source.train_ds[0][0])
    assert shown.shape == (24, 24, 3) and np.abs(shown[..., 0]-deep/257).max() <= .5


@pytest.mark.parametrize('factor', [.7, .3]) # of the image: Pillow warns of the first, and refuses the second
def test_an_image_with_too_many_pixels_is_not_decoded(tmp_path, monkeypatch, factor):
    folder(tmp_path)
    picture(tmp_path/'train/cat/big.png', size=2000)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', int(2000*2004*factor))
    load, decoded = ImageFile.ImageFile.load, []
    monkeypatch.setattr(ImageFile.ImageFile, 'load', lambda im: decoded.append(im.size) or load(im))
    (train, _, skipped), text = warnings_of(lambda: scan_images(tmp_path))
    assert len(train) == 12 and [s[-7:] for s in skipped] == ['big.png'] and decoded and max(decoded) < (2000, 0)
    limit = f'{int(2000*2004*factor):,}'
    assert f'have more than {limit} pixels and are skipped' in text and 'raise PIL.Image.MAX_IMAGE_PIXELS' in text


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
