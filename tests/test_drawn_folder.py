"""Folders that processes fill by number: shares, names, what is there, bounds."""

from __future__ import annotations

import errno
import os
import threading
import time
import tracemalloc

import pytest
import torch

from ddpm_fast.training import drawn_folder
from ddpm_fast.training.draw import draw_folder
from ddpm_fast.training.drawn_folder import DrawnFolder, Share, id_of, name_of
from ddpm_fast.training.pictures import png


class Painter:
    """In an Artist's place: an image is made of its number and the colour."""

    def __init__(self, colour=0):
        self.colour, self.batches = colour, []

    def fingerprint(self):
        return f"{self.colour:016x}"

    def images(self, ids):
        self.batches.append(tuple(ids))
        return torch.stack([self.image(i) for i in ids])

    def image(self, i):
        generator = torch.Generator().manual_seed(1000 * self.colour + i)
        return torch.randint(0, 256, (1, 8, 8), dtype=torch.uint8, generator=generator)


def files(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def reads(monkeypatch):
    """The names of the files whose ends are read, as they are."""
    seen, ends = [], drawn_folder._ends
    monkeypatch.setattr(
        drawn_folder, "_ends", lambda path, count: (seen.append(path.name), ends(path, count))[1]
    )
    return seen


# Shares -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num", [1, 4, 23, 24])
@pytest.mark.parametrize("batch_size", [1, 4, 50])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_image_is_of_one_process(num, batch_size, world_size):
    shares = [Share(num, batch_size, rank, world_size) for rank in range(world_size)]
    whole = list(Share(num, batch_size).batches())
    assert [i for batch in whole for i in batch] == list(range(num))
    mine = [list(share.batches()) for share in shares]
    assert sorted((batch for part in mine for batch in part), key=lambda b: b.start) == whole
    for share, part in zip(shares, mine, strict=True):
        assert share.images == sum(map(len, part))
        assert [i for batch in part for i in batch] == [i for i in range(num) if share.has(i)]
        assert list(share.batches(below=5)) == [batch for batch in part if batch.start < 5]


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0, 4), r"num must lie in 1 … 2\^63 - 1; got 0"),
        ((1 << 63, 4), "num must lie in"),
        ((3, 0), "batch_size must be at least 1; got 0"),
        ((3, 4, 2, 2), "rank must lie in 0 … 1, for 2 processes; got 2"),
        ((3, 4, -1, 2), "got -1"),
        ((3, 4, 0, 0), "for 0 processes"),
    ],
)
def test_shares_out_of_range(numbers, message):
    with pytest.raises(ValueError, match=message):
        Share(*numbers)


# Names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("i", [0, 7, 999_999, 1_000_000, 12_345_678])
def test_names_and_numbers(i):
    assert id_of(name_of(i)) == i


@pytest.mark.parametrize(
    "name",
    [
        "7.png",
        "0000007.png",
        "000007.PNG",
        "000007.png.bak",
        ".000007.png.12.partial",
        "grid.png",
        "-00007.png",
        "٠٠٠٠٠٧.png",
    ],
)
def test_names_of_other_files(name):
    assert id_of(name) is None


def test_past_a_million(tmp_path):
    """Names have seven digits there, in the same folder; those below keep theirs."""
    processes = 250_001
    for rank in (0, processes - 2, processes - 1):
        draw_folder(Painter(), tmp_path, 1_000_002, batch_size=4, rank=rank, world_size=processes)
    ids = [0, 1, 2, 3, 999_996, 999_997, 999_998, 999_999, 1_000_000, 1_000_001]
    assert sorted(map(id_of, os.listdir(tmp_path))) == ids
    assert (tmp_path / "1000001.png").exists()
    painter = Painter()
    draw_folder(
        painter, tmp_path, 1_000_002, batch_size=4, rank=processes - 1, world_size=processes
    )
    assert painter.batches == []


# What is there ------------------------------------------------------------------------------


def test_numbers_of_a_rerun(tmp_path):
    first = draw_folder(Painter(), tmp_path, 20, batch_size=4)
    assert (first.images, first.beyond) == (20, 0)
    (tmp_path / "000013.png").unlink()
    painter = Painter()
    again = draw_folder(painter, tmp_path, 16, batch_size=4)
    assert painter.batches == [(12, 13, 14, 15)]
    assert (again.images, again.beyond) == (4, 4)


@pytest.mark.parametrize("read_first", [100, 0])
def test_what_is_read_before_drawing(tmp_path, monkeypatch, read_first):
    """All files where they are few, one a batch where they are many, and no other's."""
    draw_folder(Painter(), tmp_path, 48, batch_size=4)
    (tmp_path / "000042.png").unlink()
    monkeypatch.setattr(drawn_folder, "READ_FIRST", read_first)
    seen = reads(monkeypatch)
    folder = DrawnFolder(tmp_path, Share(48, 4, 0, 2), Painter().fingerprint())
    mine = [i for i in range(48) if i // 4 % 2 == 0 and i != 42]
    assert seen == [name_of(i) for i in mine if read_first or i % 4 == 0]
    assert folder.there == 20
    del seen[:]
    assert list(folder.to_draw()) == [range(40, 44)]
    rest = [] if read_first else [i for i in mine if i < 40]
    assert seen == [name_of(i) for i in [40, 41, 42, 43, *rest]]


@pytest.mark.parametrize("read_first", [100, 0])
@pytest.mark.parametrize("which", [4, 6, 11])
def test_images_of_others_are_refused(tmp_path, monkeypatch, read_first, which):
    """By name, and before anything is drawn unless it is in the middle of a batch among many."""
    draw_folder(Painter(), tmp_path, 12, batch_size=4)
    for name in ("000001.png", "grid.png"):
        (tmp_path / name).unlink()
    other = Painter(1)
    DrawnFolder(tmp_path, Share(12, 4), other.fingerprint(), True).write(which, other.image(which))
    before = files(tmp_path)
    monkeypatch.setattr(drawn_folder, "READ_FIRST", read_first)
    painter = Painter()
    with pytest.raises(FileExistsError, match=f"{name_of(which)} is there, and was not drawn"):
        draw_folder(painter, tmp_path, 12, batch_size=4)
    early = read_first or which == 4
    assert painter.batches == ([] if early else [(0, 1, 2, 3)])
    assert files(tmp_path).items() >= before.items()


def test_another_job_that_comes_meanwhile(tmp_path):
    """Its images are kept where they are the same, and refused where they are not."""
    first, second = (DrawnFolder(tmp_path, Share(8, 4), "same") for _ in range(2))
    for i in range(4):
        second.write(i, Painter().image(i))
    assert (first.there, list(first.to_draw()), first.there) == (0, [range(4, 8)], 4)
    for path in tmp_path.iterdir():
        path.unlink()

    class Met(Painter):
        def __init__(self, other, first):
            super().__init__()
            self.other, self.first = other, first

        def images(self, ids):
            if ids[0] == 0:
                folder = DrawnFolder(tmp_path, Share(16, 4), self.other.fingerprint())
                for i in range(self.first, self.first + 4):
                    folder.write(i, self.other.image(i))
            return super().images(ids)

    painter = Met(Painter(), 8)
    assert draw_folder(painter, tmp_path, 16, batch_size=4).images == 12
    assert [batch[0] for batch in painter.batches] == [0, 4, 12]
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(FileExistsError, match=r"000008\.png is there"):
        draw_folder(Met(Painter(1), 8), tmp_path, 16, batch_size=4)


@pytest.mark.parametrize("read_first", [100, 0])
@pytest.mark.parametrize("keep", [-5, 0])
def test_a_copy_cut_short_is_drawn_again(tmp_path, monkeypatch, keep, read_first):
    draw_folder(Painter(), tmp_path, 12, batch_size=4)
    whole = files(tmp_path)
    (tmp_path / "000006.png").write_bytes(whole["000006.png"][:keep])
    monkeypatch.setattr(drawn_folder, "READ_FIRST", read_first)
    folder = DrawnFolder(tmp_path, Share(12, 4), Painter().fingerprint())
    assert folder.there == (8 if read_first else 12)
    assert (list(folder.to_draw()), folder.there) == ([range(4, 8)], 8)
    painter = Painter()
    draw_folder(painter, tmp_path, 12, batch_size=4)
    assert painter.batches == [(4, 5, 6, 7)]
    assert files(tmp_path) == whole


def test_a_file_in_other_bytes_is_still_known_by_its_text(tmp_path, monkeypatch):
    """Where the chunks' order is another: only then is pillow asked."""
    asked = []
    original = drawn_folder.png_text
    monkeypatch.setattr(
        drawn_folder, "png_text", lambda path: (asked.append(path.name), original(path))[1]
    )
    draw_folder(Painter(), tmp_path, 4)
    whole = (tmp_path / "000002.png").read_bytes()
    gamma = bytes.fromhex("0000000467414d410000b18f0bfc6105")
    (tmp_path / "000002.png").write_bytes(whole[:33] + gamma + whole[33:])
    painter = Painter()
    draw_folder(painter, tmp_path, 4)
    assert (painter.batches, set(asked)) == ([], {"000002.png"})


def test_a_folder_by_an_images_name(tmp_path):
    (tmp_path / "000002.png").mkdir()
    with pytest.raises(FileExistsError, match=r"000002\.png is there"):
        draw_folder(Painter(), tmp_path, 4)


# --overwrite --------------------------------------------------------------------------------


@pytest.mark.parametrize("read_first", [100, 0])
def test_overwriting_goes_on_where_it_stopped(tmp_path, monkeypatch, read_first):
    monkeypatch.setattr(drawn_folder, "READ_FIRST", read_first)
    draw_folder(Painter(1), tmp_path, 12, batch_size=4)

    class Stops(Painter):
        def images(self, ids):
            if 8 in ids:
                raise KeyboardInterrupt
            return super().images(ids)

    with pytest.raises(KeyboardInterrupt):
        draw_folder(Stops(), tmp_path, 12, batch_size=4, overwrite=True)
    assert not (tmp_path / "grid.png").exists()  # it would show images that are gone
    painter = Painter()
    draw_folder(painter, tmp_path, 12, batch_size=4, overwrite=True)
    assert (8, 9, 10, 11) in painter.batches
    assert (0, 1, 2, 3) not in painter.batches
    draw_folder(Painter(), tmp_path / "fresh", 12, batch_size=4)
    fresh = files(tmp_path / "fresh")
    assert {name: (tmp_path / name).read_bytes() for name in fresh} == fresh


def test_the_grid_waits_for_all_of_its_images(tmp_path):
    """A process leaves the old grid where the others have yet to draw theirs, and makes it last."""
    draw_folder(Painter(1), tmp_path, 12, batch_size=4)
    for rank in (1, 0):
        draw_folder(Painter(), tmp_path, 12, batch_size=4, rank=rank, world_size=2, overwrite=True)
        assert (tmp_path / "grid.png").exists() == (rank == 0)


def test_the_grid_is_of_all_that_are_asked_for(tmp_path):
    """One of fewer stays until then, and one that is right is not written again."""

    class Looks(Painter):
        def images(self, ids):
            assert (tmp_path / "grid.png").read_bytes() == before
            return super().images(ids)

    draw_folder(Painter(), tmp_path / "fresh", 12, batch_size=4)
    draw_folder(Painter(), tmp_path, 6, batch_size=4)
    before = (tmp_path / "grid.png").read_bytes()
    draw_folder(Looks(), tmp_path, 12, batch_size=4)
    assert (tmp_path / "grid.png").read_bytes() == (tmp_path / "fresh" / "grid.png").read_bytes()
    when = (tmp_path / "grid.png").stat().st_mtime_ns
    draw_folder(Painter(), tmp_path, 12, batch_size=4)
    assert (tmp_path / "grid.png").stat().st_mtime_ns == when  # not written again


# Bounds -------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_what_is_asked_for(tmp_path):
    DrawnFolder(tmp_path, Share(8, 4), Painter().fingerprint()).write(6, Painter().image(6))
    tracemalloc.start()
    folder = DrawnFolder(tmp_path, Share(10**15, 4, 1, 3), Painter().fingerprint())
    batches = folder.to_draw()
    assert [next(batches).start for _ in range(4)] == [4, 16, 28, 40]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_slow_disk_holds_the_drawing_up(tmp_path, monkeypatch):
    """One batch is written, at most one more waits."""
    written, ahead, lock = [0], [], threading.Lock()
    write = DrawnFolder.write

    def slow(self, i, image):
        time.sleep(0.005)
        write(self, i, image)
        with lock:
            written[0] += 1

    class Counting(Painter):
        def images(self, ids):
            ahead.append(4 * len(self.batches) - written[0])
            return super().images(ids)

    monkeypatch.setattr(DrawnFolder, "write", slow)
    draw_folder(Counting(), tmp_path, 40, batch_size=4)
    assert len(ahead) == 10
    assert max(ahead) <= 4


def test_the_writers_end(tmp_path, monkeypatch):
    """After an error those in flight end, and the others do not begin."""
    started, barrier = [], threading.Barrier(4)

    def full(path, data):
        started.append(path.name)
        barrier.wait(timeout=10)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(drawn_folder, "write_bytes", full)
    threads = threading.active_count()
    with pytest.raises(OSError, match="No space left"):
        draw_folder(Painter(), tmp_path, 80, batch_size=40)
    assert threading.active_count() == threads
    assert len(started) < 40


def test_pngs_begin_as_they_are_read():
    text = f'{{"id": 3, "drawn_with": "{"0" * 16}"}}'
    data = png(Painter().image(3), text)
    assert data[drawn_folder._TEXT_AT :].startswith(b"ddpm_fast\0" + text.encode())
    assert data.endswith(drawn_folder._END)
