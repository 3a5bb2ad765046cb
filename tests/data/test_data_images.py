"""Pixels: every array operation equals the obvious loop or torchvision's own transform."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2
from true_formats import pixels

from prunectl.data import load, preprocess
from prunectl.data.dataset import Augmentation
from prunectl.data.draws import Stream, integers, uniforms
from prunectl.data.images import as_pixels, centred, fitted, mirrored, normalised, random_box, shifted, windowed
from prunectl.data.memory import crop_flip
from prunectl.errors import UsageError


@pytest.mark.parametrize(("c", "size", "padding"), [(1, 28, 4), (3, 32, 4), (3, 9, 1)])
def test_shift_and_mirror_equal_torchvision_one_by_one(c, size, padding):
    images = pixels(40, c, size, size)
    rng = np.random.default_rng(1)
    dy, dx = rng.integers(0, 2 * padding + 1, (2, 40))
    flips = rng.random(40) < 0.5
    got = mirrored(shifted(images, dy, dx, padding), flips)
    for k in range(40):
        one = v2.functional.crop(v2.functional.pad(torch.from_numpy(images[k]), [padding]), int(dy[k]), int(dx[k]), size, size)
        assert np.array_equal(got[k], v2.functional.horizontal_flip(one) if flips[k] else one)


def test_no_shift_is_the_image_itself():
    images = pixels(5, 3, 8, 8)
    assert np.array_equal(shifted(images, np.full(5, 1), np.full(5, 1), 1), images)


def test_crop_flip_depends_on_position_not_on_the_batch():
    images, index, how = pixels(30, 1, 28, 28), np.arange(100, 130), Augmentation("crop-flip", 3, 7)
    together = crop_flip(images, index, how)
    order = np.random.default_rng(0).permutation(30)
    assert np.array_equal(crop_flip(images[order], index[order], how), together[order])
    assert np.array_equal(crop_flip(images[4:5], index[4:5], how), together[4:5])


def test_crop_flip_uses_every_shift_up_to_an_eighth_and_half_the_flips():
    index = np.arange(5000)
    ramp = np.broadcast_to(np.arange(1, 33, dtype=np.uint8) * 7, (5000, 1, 32, 32))
    out = crop_flip(ramp.copy(), index, Augmentation("crop-flip", 0, 1))
    rows = out[:, 0, 16]
    rising = (np.diff(rows.astype(int), axis=1)[:, 10:20] > 0).all(1)
    assert abs(rising.mean() - 0.5) < 4 * 0.5 / np.sqrt(5000)  # four standard errors
    assert set(np.unique(rows[rising][:, 16])) == {7 * (17 + d) for d in range(-4, 5)}
    assert set(np.unique(integers((Stream.SHIFT_Y, 0, 1), index, 9))) == set(range(9))
    only_crop = crop_flip(ramp.copy(), index, Augmentation("crop", 0, 1))
    flipped = uniforms((Stream.FLIP, 0, 1), index) < 0.5
    assert np.array_equal(only_crop[~flipped], out[~flipped]) and np.array_equal(only_crop[flipped][..., ::-1], out[flipped])
    only_flip = crop_flip(ramp.copy(), index, Augmentation("flip", 0, 1))
    assert np.array_equal(only_flip[~flipped], ramp[~flipped]) and np.array_equal(only_flip[flipped], ramp[flipped][..., ::-1])


def test_pad_adds_black_and_keeps_every_pixel():
    images = torch.from_numpy(pixels(3, 1, 28, 28))
    padded = fitted(images, 33, "pad")
    assert torch.equal(padded[..., 2:30, 2:30], images)
    assert padded.long().sum() == images.long().sum()


@pytest.mark.parametrize("size", [64, 40, 16])
def test_resize_equals_torchvision(size):
    images = torch.from_numpy(pixels(3, 3, 32, 32))
    expected = v2.functional.resize(images, [size, size], antialias=size < 32)
    assert (fitted(images, size, "resize").int() - expected.int()).abs().max() <= 1  # fixed-point against float rounding


def test_padding_to_less_is_refused():
    with pytest.raises(UsageError, match="resize"):
        fitted(torch.zeros(1, 1, 28, 28, dtype=torch.uint8), 20, "pad")


def test_normalised_equals_the_definition():
    images = pixels(4, 3, 8, 8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    expected = (images / 255 - np.array(mean)[:, None, None]) / np.array(std)[:, None, None]
    got = normalised(torch.from_numpy(images), mean, std)
    assert got.dtype == torch.float32
    assert np.abs(got.numpy() - expected).max() < 1e-6  # a few float32 roundings of numbers up to 3


@pytest.mark.parametrize("size", [(90, 60), (60, 90), (64, 64), (500, 375), (51, 49), (20, 300)])
def test_centred_equals_torchvisions_resize_256_crop_224(size):
    image = Image.fromarray(pixels(1, size[1], size[0], 3)[0])
    reference = v2.Compose([v2.Resize(64, antialias=True), v2.CenterCrop(56)])(image)
    assert np.array_equal(np.array(centred(image, 56)), np.array(reference))


@given(st.integers(1, 900), st.integers(1, 900), st.integers(0, 1000))
@settings(max_examples=300, deadline=None)
def test_random_box_lies_inside(width, height, k):
    left, top, right, bottom = random_box(width, height, uniforms((k,), np.arange(40)).reshape(4, 10))
    assert 0 <= left < right <= width and 0 <= top < bottom <= height


def test_random_box_has_the_published_areas_and_ratios():
    boxes = np.array([random_box(400, 400, uniforms((9, k), np.arange(40)).reshape(4, 10)) for k in range(3000)])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, ratio = w * h / 400**2, w / h
    assert area.min() > 0.075 and area.max() <= 1 and ratio.min() > 0.74 and ratio.max() < 1.36  # a pixel of rounding
    torch.manual_seed(0)
    same = [v2.RandomResizedCrop(8).make_params([torch.zeros(3, 400, 400)]) for _ in range(3000)]
    reference = np.array([p["width"] * p["height"] for p in same]) / 400**2
    assert abs(area.mean() - reference.mean()) < 4 * np.hypot(area.std(), reference.std()) / np.sqrt(3000)  # four standard errors


def test_windowed_equals_torchvisions_resized_crop():
    image = Image.fromarray(pixels(1, 60, 90, 3)[0])
    reference = v2.functional.resized_crop(image, 5, 7, 40, 50, [32, 32], antialias=True)
    assert np.array_equal(np.array(windowed(image, (7, 5, 57, 45), 32)), np.array(reference))


@pytest.mark.parametrize(("size", "fit"), [(28, "pad"), (32, "pad"), (40, "resize"), (20, "resize")])
def test_preprocess_is_what_evaluation_does(size, fit):
    ds = load("fashion-mini", image_size=size, fit=fit)
    x, _ = next(ds.eval_batches("test", batch_size=5))
    raw = ds.stream.args[0].pool.images[ds.splits["test"][:5], 0]
    keys = ("channels", "image_size", "fit", "mean", "std")
    data = {key: value for key, value in ds.info.to_dict().items() if key in keys}
    for k in range(5):
        assert torch.equal(preprocess(raw[k], **data)[0], x[k])
        assert torch.equal(preprocess(Image.fromarray(raw[k]), **data)[0], x[k])
        colour = np.repeat(raw[k][..., None], 3, axis=2)  # a grey picture in a colour file
        assert torch.equal(preprocess(colour, **data)[0], x[k])


def test_preprocess_refuses_another_shape():
    with pytest.raises(UsageError, match="30x28"):
        preprocess(np.zeros((28, 30), np.uint8), channels=1, image_size=28, fit="none", mean=[0.3], std=[0.3])


def test_as_pixels_puts_channels_first():
    array = pixels(1, 4, 5, 3)[0]
    assert np.array_equal(as_pixels(Image.fromarray(array)), array.transpose(2, 0, 1))
