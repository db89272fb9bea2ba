"""Data sets: what an image file becomes, who stands for one that cannot be read, in which order."""

from __future__ import annotations

import itertools
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_fast import reference
from ddpm_fast.training import folders
from ddpm_fast.training.data import (
    Loader,
    TensorImages,
    UnreadableImage,
    data_order,
    flips,
    open_data,
)
from ddpm_fast.training.digits import load_digits
from ddpm_fast.training.images import fit, read_image, read_size, to_mode


def noise_image(height, width, mode="RGB", seed=0):
    bands = len(mode)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, bands), dtype=np.uint8)
    return Image.fromarray(pixels[..., 0] if bands == 1 else pixels, mode if bands == 2 else None)


@pytest.fixture
def folder(tmp_path):
    """Two classes of six images each, of many sizes."""
    for k, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        for i in range(6):
            noise_image(20 + i, 30 - 2 * i, seed=10 * k + i).save(tmp_path / name / f"{i}.png")
    return tmp_path


def spoil(folder):
    """Three files that are no images any more, each in another way."""
    whole = (folder / "cat" / "5.png").read_bytes()
    (folder / "cat" / "5.png").write_bytes(whole[: len(whole) // 2])
    (folder / "dog" / "0.png").write_bytes(b"")
    (folder / "dog" / "5.png").write_text("not an image")


# Order and flips ----------------------------------------------------------------------------


@pytest.mark.parametrize("num_images", [1, 2, 7, 256])
def test_each_epoch_is_a_permutation_of_its_own(num_images):
    epochs = data_order(num_images, 0, 4 * num_images, seed=5).view(4, num_images)
    for epoch in epochs:
        assert torch.equal(epoch.sort().values, torch.arange(num_images))
    if num_images == 256:
        assert len({tuple(epoch.tolist()) for epoch in epochs}) == 4
        assert not torch.equal(epochs[0], data_order(256, 0, 256, seed=6))


def test_order_is_a_function_of_the_position():
    whole = data_order(37, 0, 500, seed=3)
    for position, count in ((0, 500), (36, 2), (37, 37), (100, 0), (499, 1), (250, 120)):
        assert torch.equal(
            data_order(37, position, count, seed=3), whole[position : position + count]
        )


def test_order_is_that_of_the_words():
    """By Philox itself: images in the order of their 64-bit numbers, as unsigned ones."""
    for seed, epoch in ((7, 0), ((1 << 64) - 1, 3)):
        seeds = torch.tensor(seed if seed < 1 << 63 else seed - (1 << 64))
        words = reference.noise_words(
            torch.arange(5), torch.tensor(8 << 24), seeds, torch.tensor(epoch)
        )
        flat = torch.stack(words, 1).view(-1, 2)[:9].tolist()
        by_hand = sorted(range(9), key=lambda i: (flat[i][0] << 32) + flat[i][1])
        assert data_order(9, 9 * epoch, 9, seed=seed).tolist() == by_hand


def test_every_place_is_equally_likely():
    """χ² of where each of 6 images comes in 1,200 epochs; false alarm below 1e-6."""
    places = data_order(6, 0, 6 * 1200, seed=11).view(1200, 6)
    counts = torch.stack([torch.bincount(places[:, i], minlength=6) for i in range(6)])
    chi2 = ((counts - 200) ** 2 / 200).sum().item()
    assert chi2 < 25 + 12 * 50**0.5  # 25 degrees of freedom


def test_flips_are_fair_and_of_the_sample_alone():
    ids = torch.arange(20_000)
    mirrored = flips(9, ids)
    assert mirrored.dtype == torch.bool
    assert abs(mirrored.float().mean() - 0.5) < 5 * 0.5 / 20_000**0.5  # false alarm 6e-7
    chosen = torch.tensor([19_999, 3, 4096, 3])
    assert torch.equal(flips(9, chosen), mirrored[chosen])
    assert not torch.equal(flips(10, ids), mirrored)


def test_order_wants_whole_numbers_in_range():
    for bad in ({"num_images": 0}, {"position": -1}, {"count": -1}, {"seed": 1 << 64}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must lie in"):
            data_order(**{"num_images": 5, "position": 0, "count": 1, "seed": 0, **bad})


# One image ----------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"]
)
def test_every_mode_becomes_every_number_of_channels(tmp_path, mode, channels):
    """A flat colour keeps its value, whichever way it was stored."""
    suffix = {"CMYK": "jpg", "YCbCr": "jpg", "PA": "tiff"}.get(mode, "png")
    path = tmp_path / f"image.{suffix}"
    if mode == "I;16":
        image = Image.fromarray(np.full((6, 6), 51 * 257, dtype=np.uint16))
    elif mode == "1":
        image = Image.new("1", (6, 6), 1)
    elif mode == "PA":
        image = Image.new("RGBA", (6, 6), (51, 51, 51, 255)).convert("RGB").convert("P")
    else:
        image = Image.new("RGB", (6, 6), (51, 51, 51)).convert(mode)
    image.save(path, **({"quality": 100} if suffix == "jpg" else {}))
    pixels = read_image(str(path), 6, channels)
    assert pixels.shape == (channels, 6, 6)
    assert pixels.dtype == np.uint8
    level = 255 if mode == "1" else 51
    colours = pixels[:-1] if channels in (2, 4) else pixels
    tolerance = 2 if mode in ("CMYK", "YCbCr") else 0
    assert np.abs(colours.astype(int) - level).max() <= tolerance
    if channels in (2, 4):
        assert (pixels[-1] == 255).all()


def test_what_is_transparent_lies_on_white(tmp_path):
    for mode, colour in (("RGBA", (200, 0, 0, 0)), ("LA", (10, 0))):
        Image.new(mode, (4, 4), colour).save(tmp_path / "clear.png")
        assert (read_image(str(tmp_path / "clear.png"), 4, 3) == 255).all()
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([200, 0, 0])
    palette.save(tmp_path / "clear.png", transparency=0)
    assert (read_image(str(tmp_path / "clear.png"), 4, 1) == 255).all()
    Image.new("RGBA", (4, 4), (100, 100, 100, 128)).save(tmp_path / "half.png")
    assert abs(int(read_image(str(tmp_path / "half.png"), 4, 3)[0, 0, 0]) - 177) <= 1
    assert (read_image(str(tmp_path / "half.png"), 4, 4)[:, 0, 0] == [100, 100, 100, 128]).all()


def test_sixteen_bits_are_scaled_not_cut(tmp_path):
    levels = np.array([[0, 128, 129], [257, 32896, 65535]], dtype=np.uint16)
    for suffix in ("png", "tiff"):
        path = tmp_path / f"deep.{suffix}"
        Image.fromarray(levels).save(path)
        assert read_image(str(path), None, 1)[0].tolist() == [[0, 0, 1], [1, 128, 255]]


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.full((4, 4), 0.5, dtype=np.float32), "floating point, of unknown range"),
        (np.full((4, 4), 1 << 20, dtype=np.int32), "more than 16 bits"),
    ],
)
def test_pixels_of_unknown_range_are_refused(tmp_path, array, reason):
    path = tmp_path / "image.tiff"
    Image.fromarray(array).save(path)
    with pytest.raises(UnreadableImage, match=reason):
        read_image(str(path), 4, 1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_respected(tmp_path, orientation):
    """A picture stored turned, with the tag that says how, comes out upright."""
    upright = np.zeros((16, 24), dtype=np.uint8)
    upright[:8, :12] = 255  # the upper left quarter
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # pillow's transpositions, the inverses
    image = Image.fromarray(upright)
    if orientation > 1:
        image = image.transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo.png"
    image.save(path, exif=exif)
    assert read_size(str(path)) == (16, 24)
    assert np.array_equal(read_image(str(path), None, 1)[0], upright)


def test_fit_takes_the_middle_square():
    wide = np.zeros((8, 24), dtype=np.uint8)
    wide[:, 8:16] = 200
    assert (np.asarray(fit(Image.fromarray(wide), 8)) == 200).all()
    assert (np.asarray(fit(Image.fromarray(wide.T), 8)) == 200).all()
    for height, width in ((5, 5), (1, 9), (16, 16), (33, 100), (7, 300), (64, 65)):
        assert fit(noise_image(height, width), 8).size == (8, 8)


def test_fit_averages_when_it_halves():
    """No aliasing: a checkerboard of single pixels is grey at a quarter of its size."""
    board = np.indices((32, 32)).sum(0) % 2 * 254
    grey = np.asarray(fit(Image.fromarray(board.astype(np.uint8)), 8))
    assert (grey == 127).all()
    same = noise_image(8, 8)
    assert np.array_equal(np.asarray(fit(same, 8)), np.asarray(same))


def test_to_mode_leaves_what_is_right():
    image = noise_image(3, 3)
    assert to_mode(image, "RGB") is image


# Folders ------------------------------------------------------------------------------------


def test_digits_are_load_digits():
    digits = load_digits()
    for split, images, labels in (
        ("train", digits.train_images, digits.train_labels),
        ("test", digits.held_out_images, digits.held_out_labels),
    ):
        data = open_data("digits", channels=1, split=split, num_classes=10)
        got, got_labels = data.batch(range(len(data)))
        assert torch.equal(got, images)
        assert torch.equal(got_labels, labels)
    large = open_data("digits", image_size=16, channels=3)
    assert large.image_shape == (3, 16, 16)
    pixels = large.batch([0])[0][0]
    assert torch.equal(pixels[0], pixels[2])
    small = digits.train_images[0, 0].float()
    shrunk = torch.nn.functional.avg_pool2d(pixels[0].float()[None, None], 2)[0, 0]
    assert torch.corrcoef(torch.stack([small.flatten(), shrunk.flatten()]))[0, 1] > 0.97


@pytest.mark.parametrize("in_memory", [True, False])
def test_class_folders_give_labels(folder, in_memory):
    (folder / "dog" / "deep" / "er").mkdir(parents=True)
    noise_image(9, 9, seed=99).save(folder / "dog" / "deep" / "er" / "x.webp", lossless=True)
    (folder / "dog" / "._0.png").write_text("a Mac was here")
    (folder / "notes.txt").write_text("not counted")
    data = open_data(folder, image_size=9, in_memory=in_memory, num_classes=5)
    assert (len(data), data.class_names, data.num_classes) == (13, ["cat", "dog"], 2)
    images, labels = data.batch(range(13))
    assert labels.tolist() == [0] * 6 + [1] * 7
    assert np.array_equal(images[12], np.asarray(noise_image(9, 9, seed=99)).transpose(2, 0, 1))
    assert torch.equal(data.batch([12, 0])[0], images[[12, 0]])
    noise_image(9, 9).save(folder / "stray.png")
    assert open_data(folder, image_size=9).num_classes is None


def test_names_of_classes_can_be_given(folder):
    data = open_data(folder, image_size=8, class_names=["dog", "cow", "cat"])
    assert data.batch([0, 11])[1].tolist() == [2, 0]
    with pytest.raises(ValueError, match=r"a class 'dog', which is none of \['cat'\]"):
        open_data(folder, image_size=8, class_names=["cat"])


def test_train_and_test_are_splits(tmp_path):
    for name, classes in (("train", "abc"), ("test", "bc")):
        for c in classes:
            (tmp_path / name / c).mkdir(parents=True)
            noise_image(8, 8).save(tmp_path / name / c / "0.png")
    assert len(open_data(tmp_path, split="train")) == 3
    test = open_data(tmp_path, split="test")
    assert test.class_names == ["a", "b", "c"]
    assert test.batch([0, 1])[1].tolist() == [1, 2]  # as in training, though there is no a
    assert open_data(tmp_path / "test").batch([0, 1])[1].tolist() == [0, 1]


def test_one_size_for_all(folder, tmp_path):
    message = r"cat/0\.png is 20×30, \S*cat/1\.png is 21×28; name an image_size"
    with pytest.raises(ValueError, match=message):
        open_data(folder)
    same = tmp_path / "same"
    same.mkdir()
    for i in range(3):
        noise_image(5, 7, seed=i).save(same / f"{i}.png")
    data = open_data(same)
    assert data.image_shape == (3, 5, 7)
    assert np.array_equal(
        data.batch([2])[0][0], np.asarray(noise_image(5, 7, seed=2)).transpose(2, 0, 1)
    )


def test_links_are_followed_and_those_that_lead_back_are_not(folder):
    (folder / "cat" / "again").symlink_to(folder)
    elsewhere = folder.parent / f"{folder.name}-elsewhere"
    elsewhere.mkdir()
    noise_image(8, 8).save(elsewhere / "z.png")
    (folder / "eel").symlink_to(elsewhere)
    names, _ = folders.list_images(folder)
    assert len(names) == 13
    assert names[-1] == "eel/z.png"


def test_names_of_any_bytes(tmp_path):
    name = b"caf\xe9.png"
    noise_image(8, 8).save(tmp_path / "x.png")
    os.rename(tmp_path / "x.png", os.path.join(os.fsencode(tmp_path), name))
    assert open_data(tmp_path).batch([0])[0].shape == (1, 3, 8, 8)
    Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).write_bytes(b"")
    with pytest.raises(UnreadableImage) as caught:
        open_data(tmp_path)
    str(caught.value).encode()  # can be printed


@pytest.mark.parametrize(
    ("prepare", "error", "message"),
    [
        (lambda root: root / "none", FileNotFoundError, "there is nothing there"),
        (lambda root: (root / "f").write_text("x") and root / "f", NotADirectoryError, "a file"),
        (lambda root: root, FileNotFoundError, "no images in .*: there are no files"),
        (
            lambda root: (root / "a.txt").write_text("x") and root,
            FileNotFoundError,
            r"other extensions; looked for .*\.png",
        ),
    ],
)
def test_a_folder_without_images(tmp_path, prepare, error, message):
    with pytest.raises(error, match=message):
        open_data(prepare(tmp_path))


def test_labels_out_of_range(folder):
    with pytest.raises(
        ValueError, match=r"has 2 classes, labels must be below 1: 'dog' is label 1"
    ):
        open_data(folder, image_size=8, num_classes=1)
    noise_image(8, 8).save(folder / "stray.png")
    with pytest.raises(ValueError, match="has no labels, and 3 classes are asked for"):
        open_data(folder, image_size=8, num_classes=3)
    images = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"labels must lie in 0 … 1; got 0 … 2"):
        TensorImages(images, torch.tensor([0, 2]), ["a", "b"])


@pytest.mark.parametrize(
    "bad",
    [
        {"image_size": 0},
        {"channels": 5},
        {"split": "validation"},
        {"workers": -1},
        {"on_bad_image": "ignore"},
    ],
)
def test_arguments_are_checked(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        open_data("digits", **bad)


# Images that cannot be read -----------------------------------------------------------------


def test_an_image_that_cannot_be_read_is_named(folder):
    spoil(folder)
    for workers in (0, 2):
        with pytest.raises(UnreadableImage, match=r"cat/5\.png: .*truncated"):
            open_data(folder, image_size=8, workers=workers)
    data = open_data(folder, image_size=8, in_memory=False)
    with pytest.raises(UnreadableImage, match=r"dog/5\.png: it is not an image that pillow knows"):
        data.batch([1, 11])
    with pytest.raises(UnreadableImage, match=r"dog/0\.png: the file is empty"):
        data.batch([6])
    os.remove(folder / "dog" / "3.png")
    with pytest.raises(UnreadableImage, match=r"dog/3\.png: No such file"):
        data.batch([9])
    error = pickle.loads(pickle.dumps(UnreadableImage("a.png", "why")))
    assert str(error) == "cannot read image a.png: why"


def test_the_next_one_stands_for_what_is_skipped(folder, caplog):
    whole = open_data(folder, image_size=8).batch(range(12))
    spoil(folder)
    data = open_data(folder, image_size=8, on_bad_image="skip")
    images, labels = data.batch(range(12))
    stands = [0, 1, 2, 3, 4, 7, 7, 7, 8, 9, 10, 0]  # 5 → 6 → 7; 11 → 0
    assert torch.equal(images, whole[0][stands])
    assert torch.equal(labels, whole[1][stands])
    assert sorted(data.bad_images) == [5, 6, 11]
    named = [record.getMessage() for record in caplog.records]
    assert len(named) == 3
    for name in ("cat/5.png", "dog/0.png", "dog/5.png"):
        assert sum(name in line for line in named) == 1


def test_what_is_skipped_depends_on_the_files_alone(folder, caplog):
    """In memory or not, whoever reads, wherever a run begins."""
    spoil(folder)
    positions = [range(start, start + 8) for start in range(0, 64, 8)]
    results = []
    for in_memory, workers, begin in itertools.product((True, False), (0, 2), (0, 3)):
        caplog.clear()
        data = open_data(
            folder, image_size=8, on_bad_image="skip", workers=workers, in_memory=in_memory
        )
        with Loader(data, positions[begin:], seed=1, flip=True) as loader:
            batches = list(loader)
        assert sorted(data.bad_images) == [5, 6, 11]
        assert len(caplog.records) == 3
        results.append([None] * begin + batches)
    for batches in results:
        for first, batch in zip(results[0], batches, strict=True):
            if batch is not None:
                assert torch.equal(batch.images, first.images)
                assert torch.equal(batch.labels, first.labels)
                assert torch.equal(batch.sample_ids, first.sample_ids)


def test_headers_that_cannot_be_read(folder):
    for path in folder.rglob("*.png"):
        noise_image(6, 6).save(path)
    spoil(folder)
    with pytest.raises(UnreadableImage, match=r"dog/0\.png"):
        open_data(folder)  # its size is wanted
    data = open_data(folder, on_bad_image="skip")
    assert data.image_shape == (3, 6, 6)
    assert sorted(data.bad_images) == [5, 6, 11]


def test_none_is_readable(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_text("no")
    for size in (8, None):
        with pytest.raises(ValueError, match=r"none of the 3 images of .* is readable"):
            open_data(tmp_path, image_size=size, on_bad_image="skip")


# Loader -------------------------------------------------------------------------------------


def test_loader_reads_what_order_and_flips_say(folder):
    data = open_data(folder, image_size=8, in_memory=False)
    images, labels = data.batch(range(12))
    order, mirrored = data_order(12, 0, 60, seed=4), flips(4, torch.arange(60))
    expected = torch.where(mirrored[:, None, None, None], images[order].flip(-1), images[order])
    positions = [range(5, 20), torch.tensor([59, 0, 12]), [7, 7], range(20, 60, 4)]
    for workers in (0, 1, 2):
        with Loader(data, positions, seed=4, flip=True, workers=workers) as loader:
            for _ in range(2):  # and again
                for wanted, batch in zip(positions, loader, strict=True):
                    ids = torch.as_tensor(list(wanted))
                    assert torch.equal(batch.sample_ids, ids)
                    assert torch.equal(batch.images, expected[ids])
                    assert torch.equal(batch.labels, labels[order[ids]])
    in_order = next(iter(Loader(data, [range(14)], shuffle=False)))
    assert torch.equal(in_order.images, images[torch.arange(14) % 12])


def test_flips_do_not_touch_the_data():
    data = TensorImages(torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8))
    before = data.images.clone()
    list(Loader(data, [range(16)], flip=True))
    assert torch.equal(data.images, before)


def test_endless_positions_are_taken_as_needed():
    data = open_data("digits", channels=1)
    endless = (range(start, start + 32) for start in itertools.count(0, 32))
    with Loader(data, endless, seed=1, workers=2) as loader:
        batches = list(itertools.islice(loader, 5))
    assert torch.cat([batch.sample_ids for batch in batches]).tolist() == list(range(160))
    assert next(endless).start <= (5 + 2 * 2 + 1) * 32  # no further ahead than they prefetch


def test_torchs_generator_is_left_alone(folder):
    data = open_data(folder, image_size=8, in_memory=False)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with Loader(data, [range(4)], workers=1) as loader:
        list(loader)
    assert torch.equal(torch.rand(4), expected)


def test_an_error_in_a_worker_is_the_error_itself(folder):
    spoil(folder)
    data = open_data(folder, image_size=8, in_memory=False)
    loader = Loader(data, [range(12)], workers=2)
    with pytest.raises(UnreadableImage) as caught:
        list(loader)
    assert re.fullmatch(r"cannot read image \S+: [^\n]+", str(caught.value))


def test_loader_checks_its_arguments():
    data = open_data("digits", channels=1)
    for bad in ({"workers": -1}, {"prefetch": 0}):
        with pytest.raises(ValueError, match="workers must be at least 0 and prefetch at least 1"):
            Loader(data, [], **bad)


INTERRUPTED = """
import signal, sys
from ddpm_fast.training.data import Loader, open_data
data = open_data(sys.argv[1], image_size=8, in_memory=False)
positions = (range(i, i + 8) for i in range(0, 1 << 40, 8))
batches = iter(Loader(data, positions, workers=2))
next(batches)
received = []
if sys.argv[2] == "finish":
    signal.signal(signal.SIGINT, lambda *_: received.append(1))
print("ready", flush=True)
try:
    while not received:
        next(batches)
    for _ in range(20):
        next(batches)
    print("finished", flush=True)
except KeyboardInterrupt:
    print("stopped", flush=True)
"""


@pytest.mark.parametrize(("how", "said"), [("finish", "finished"), ("stop", "stopped")])
def test_ctrl_c_is_the_callers_alone(folder, how, said):
    """The workers neither end, where the caller goes on, nor say anything, where it does not."""
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(folder), how],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, f"{said}\n", "")


def test_no_warning_comes_of_it(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = open_data(folder, image_size=8, workers=1)
        list(Loader(data, [range(4)], flip=True))
