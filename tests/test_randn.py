"""randn as an op: registration, arguments, layouts. Its values are test_noise's."""

from __future__ import annotations

import pytest
import torch
from helpers import DTYPES

from ddpm_fast import randn

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    ids = torch.arange(3)
    arguments = ([3, 2, 5, 7], 1, None, ids, 0, 0, None, dtype, torch.device("cpu"), False)
    torch.library.opcheck(torch.ops.ddpm_fast.randn.default, arguments)
    arguments = ([3, 2, 5, 7], 1, ids, None, 3, 0, ids, dtype, torch.device("cpu"), True)
    torch.library.opcheck(torch.ops.ddpm_fast.randn.default, arguments)


def test_compiles_whole():
    def f(ids: torch.Tensor) -> torch.Tensor:
        return randn([3, 2, 5, 7], seed=4, sample_ids=ids, stream=130, index=9) * 2

    ids = torch.tensor([4, 0, 9])
    assert torch.equal(torch.compile(f, fullgraph=True)(ids), f(ids))


def test_one_compilation_serves_many_seeds():
    compiled = torch.compile(lambda seed: randn([2, 8], seed=seed), fullgraph=True, dynamic=True)
    for seed in (3, 2**40, 2**63 + 1):
        assert torch.equal(compiled(seed), randn([2, 8], seed=seed))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0,), (3,), (1, 1, 1, 1, 1, 1)])
def test_odd_shapes(shape):
    z = randn(shape, seed=1)
    assert z.shape == torch.Size(shape)
    assert z.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"seed": -1}, ValueError, r"seed must lie in 0 … 2\^64 - 1; got -1"),
        ({"seed": 2**64}, ValueError, "seed must lie in"),
        ({"seed": 1.0}, TypeError, "seed must be an integer"),
        ({"seed": True}, TypeError, "seed must be an integer"),
        ({"seed": torch.zeros(2)}, TypeError, "seed must be int64; got torch.float32"),
        ({"seed": torch.zeros(3, dtype=torch.int64)}, ValueError, r"seed must have shape \[2\]"),
        ({"sample_ids": [1]}, ValueError, r"sample_ids must have shape \[2\]; got \[1\]"),
        ({"sample_ids": [1, -1]}, ValueError, "sample_ids must lie in 0 … 2"),
        ({"sample_ids": torch.tensor([1, -5])}, ValueError, "must not be negative; got -5"),
        ({"sample_ids": [1, 2.0]}, TypeError, "sample_ids must be an integer; got 2.0"),
        ({"sample_ids": torch.tensor([1.0, 2.0])}, TypeError, "sample_ids must be int64"),
        ({"stream": 256}, ValueError, "stream must lie in 0 … 255; got 256"),
        ({"index": 2**24}, ValueError, r"index must lie in 0 … 2\^24 - 1"),
        ({"index": torch.tensor([0, 2**24])}, ValueError, "index must lie in 0 … 16777215"),
        ({"dtype": torch.float64}, TypeError, "dtype must be float32, bfloat16, float16"),
        ({"memory_format": torch.channels_last}, ValueError, "does not fit 2 dimensions"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        randn([2, 4], **{"seed": 0, **arguments})


def test_bad_shapes():
    with pytest.raises(ValueError, match="first dimension of samples"):
        randn([], seed=0)
    with pytest.raises(ValueError, match="negative"):
        randn([2, -1], seed=0)
    with pytest.raises(ValueError, match=r"at most 2\^34 elements"):
        randn([1, 2**34 + 1], seed=0)


def test_traces_for_a_gpu_that_is_not_here():
    """Which backend runs is asked when the op runs, not while a function is traced."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def f(x):
        return x + randn(x.shape, seed=1, device=x.device)

    with FakeTensorMode():
        x = torch.empty(2, 3, device="cuda")
        assert torch.compile(f, fullgraph=True, backend="eager")(x).shape == (2, 3)
