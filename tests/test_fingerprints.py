"""Values and models by their fingerprints: equal in every process, different where they are."""

from __future__ import annotations

import enum
import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from ddpm_fast.fingerprints import model_texts, tensor_text, value_text


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


X = torch.arange(6, dtype=torch.float32).reshape(2, 3)
DIFFERENT = [
    None, True, False, 0, 1, 1.0, -0.0, 0.0, float("nan"), float("inf"), 1j, "", "None", "1", b"1",
    b"2", [], (), {}, set(), [1], (1,), {1: 2}, {1: 3}, {2: 2}, {1}, [[1], 2], [[1, 2]], range(3),
    X, X + 1, X.T, X.reshape(3, 2), X.reshape(1, 2, 3), X.half(), X.bfloat16(), X.long(), X.int(),
    X.bool(), X[:0], X[:, :0], X[0, 0], X.numpy(), X.long().numpy(), np.float32(0), np.float64(0),
    np.arange(3), "a" * 300, "a" * 301, Colour.RED, Colour.BLUE, torch.float16, torch.bfloat16,
    torch.device("cpu"), torch.complex(X, X), [X, X + 1], [X + 1, X],
]  # fmt: skip


def test_different_values_have_different_texts():
    texts = [value_text(value, "it") for value in DIFFERENT]
    for (a, left), (b, right) in itertools.combinations(enumerate(texts), 2):
        assert left != right, (DIFFERENT[a], DIFFERENT[b])
    assert all(len(text) < 250 for text in texts)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (X, X.clone()),
        (X.T, X.T.contiguous()),
        (torch.zeros(4, 3)[::2], torch.zeros(2, 3)),
        (torch.complex(X, X).conj(), torch.complex(X, -X)),
        ({"a": X, "b": 1}, {"b": 1, "a": X.clone()}),
        ({"x", "y", "z"}, {"z", "y", "x"}),
        (np.arange(6)[::2], np.array([0, 2, 4])),
        (nn.Parameter(X), X),
    ],
)
def test_equal_values_have_equal_texts(left, right):
    assert value_text(left, "it") == value_text(right, "it")


def test_in_another_process():
    code = (
        "import torch\nfrom ddpm_fast.fingerprints import value_text\n"
        "print(value_text({'x': {'a', 'b', 'c'}, 'y': [torch.ones(3), 1 / 3]}, ''))"
    )
    made = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    here = value_text({"y": [torch.ones(3), 1 / 3], "x": {"c", "b", "a"}}, "")
    assert made.strip() == here


def module(**parts) -> nn.Module:
    made = nn.Module()
    for name, part in parts.items():
        if isinstance(part, nn.Parameter | nn.Module):
            setattr(made, name, part)
        else:
            made.register_buffer(name, part, persistent=False)
    return made.eval()


def test_models_are_known_by_their_tensors():
    one, two = torch.ones(2), torch.zeros(2)
    models = [
        module(),
        module(a=one),
        module(b=one),
        module(a=two),
        module(a=one[:1]),
        module(a=one[:, None]),
        module(a=one.view(torch.int32)),
        module(a=one, b=two),
        module(a=two, b=one),
        module(a=module(b=one)),
        nn.Identity().eval(),
        nn.Identity(),
    ]
    texts = [tuple(model_texts(model).items()) for model in models]
    assert len(set(texts)) == len(models)
    again = module(a=nn.Parameter(one.clone()))  # a parameter or a buffer: the same values
    assert model_texts(again) == model_texts(models[1])
    tied = module(a=one, b=one)
    assert model_texts(tied) == model_texts(module(a=one, b=one.clone()))


def test_the_config_counts_but_for_where_it_came_from():
    def of(**config):
        model = module(a=torch.ones(1))
        model.config = config
        return model_texts(model)

    assert of(heads=1) != of(heads=2)
    assert of(heads=1, _name_or_path="here") == of(heads=1, _name_or_path="there")
    assert "the model's config" not in of(function=print)


def test_other_callables():
    assert model_texts(test_other_callables) == {"model": "test_other_callables"}
    conv = nn.Conv2d(1, 1, 1).eval()
    assert model_texts(conv.forward).keys() == model_texts(conv).keys()
    assert model_texts(conv.forward)["model"] == "Conv2d.forward"


@pytest.mark.parametrize(
    ("tensor", "what"),
    [
        (torch.zeros(2, device="meta"), "a is on the meta device"),
        (torch.eye(2).to_sparse(), "a is torch.sparse_coo, torch.float32"),
    ],
)
def test_values_that_are_not_there(tensor, what):
    with pytest.raises(TypeError, match=f"{what}: a checkpoint needs its values"):
        tensor_text(tensor, "a")
    with pytest.raises(TypeError, match=f"the model's {what}"):
        model_texts(module(a=tensor))
