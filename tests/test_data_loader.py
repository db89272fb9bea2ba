"""In which order the images come and which are mirrored, and the loader that reads them."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch
from image_folders import (
    spoil,
    two_classes,  # noqa: F401
)

from ddpm_fast import reference
from ddpm_fast.training.data import (
    Loader,
    TensorImages,
    UnreadableImage,
    data_order,
    flips,
    open_data,
)

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
