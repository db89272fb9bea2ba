"""Data sets: which images a folder holds and their labels, and who stands for one that cannot be
read."""

from __future__ import annotations

import itertools
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from image_folders import (
    noise_image,
    spoil,
    two_classes,  # noqa: F401
)

from ddpm_fast.training import folders
from ddpm_fast.training.data import Loader, TensorImages, UnreadableImage, open_data
from ddpm_fast.training.digits import load_digits

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
