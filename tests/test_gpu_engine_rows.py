"""A plan at rows that lie on a GPU: one captured graph serves them all, and nothing waits."""

from __future__ import annotations

import pytest
import torch
from gpu_backends import backend_in_use  # noqa: F401
from helpers import DTYPES
from plan_errors import relative
from test_gpu_engine import full_float32, unet  # noqa: F401

from ddpm_fast import prepare
from ddpm_fast.engine import mixed_step

pytestmark = pytest.mark.gpu

COUNT = 11
VARIANTS = ["plain", "classes", "scaled, by blocks"]


def images() -> torch.Tensor:
    return torch.randn((COUNT, 3, 16, 16), generator=torch.Generator().manual_seed(5)).cuda()


def labels_of(name: str) -> list[torch.Tensor | None]:
    """Each way in which labels may be given."""
    if name != "classes":
        return [None]
    return [None, torch.arange(COUNT, device="cuda") % 10, torch.ones(1, device="cuda").long()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_one_graph_serves_all_rows(name, dtype):
    plan, x = prepare(unet(name).cuda(), dtype=dtype), images()
    trajectory = plan.trajectory(range(999, -1, -1))
    for labels in labels_of(name):
        for shape in ((1,), (COUNT,)):
            row = torch.zeros(shape, dtype=torch.int64, device="cuda")
            torch.cuda.synchronize()
            with torch.cuda.stream(torch.cuda.Stream()):
                trajectory.step(row, x, labels)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = trajectory.step(row, x, labels)
            for number in (999, 3, 64):
                row.fill_(number)
                graph.replay()
                assert torch.equal(output, trajectory.step(row, x, labels))
                if shape == (1,):
                    assert torch.equal(output, trajectory.step(number, x, labels))


def test_a_table_is_not_made_in_a_graph():
    trajectory = prepare(unet("plain").cuda()).trajectory(range(999, -1, -1))
    row, x = torch.zeros((), dtype=torch.int64, device="cuda"), images()
    prepare(unet("plain").cuda()).trajectory([5]).step(row, x)  # all that is loaded at a first call
    torch.cuda.synchronize()
    with (
        pytest.raises(RuntimeError, match="before the table that it reads is made: call it once"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        trajectory.step(row, x)
    assert trajectory.step(row, x).isfinite().all()


@pytest.mark.parametrize("name", VARIANTS)
def test_samples_at_several_rows_wait_for_nothing(name, full_float32):  # noqa: F811
    plan, x = prepare(unet(name).cuda()), images()
    long, short = plan.trajectory(range(999, -1, -1)), plan.trajectory([900, 500, 3])
    places = [(long, 0), (short, 2), (long, 999), (long, 64), (short, 0), (long, 7)]
    places += [(long, 64), (short, 1), (long, 63), (long, 500), (long, 1)]
    rows = torch.arange(COUNT, device="cuda") * 90
    beyond = rows - 10**6  # all of them before the first
    for labels in labels_of(name):

        def calls(labels=labels):
            return (
                mixed_step(places, x, labels),
                long.step(rows, x, labels),
                long.step(beyond, x, labels),
            )

        calls()  # makes the tables
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = calls()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for output, where in zip(
            found,
            (places, [(long, 90 * i) for i in range(COUNT)], [(long, 0)] * COUNT),
            strict=True,
        ):
            alone = [
                trajectory.step(row, x[i : i + 1], of_sample(labels, i))
                for i, (trajectory, row) in enumerate(where)
            ]
            assert relative(output, torch.cat(alone).double()) < 1e-4


def of_sample(labels: torch.Tensor | None, i: int) -> torch.Tensor | None:
    return labels if labels is None or len(labels) == 1 else labels[i : i + 1]
