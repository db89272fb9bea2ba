"""Values and models by their fingerprints: equal in every process, different where they are."""

from __future__ import annotations

import dataclasses
import enum
import functools
import itertools
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from torch import nn

from ddpm_fast import UNet, UNetConfig, prepare
from ddpm_fast.fingerprints import model_texts, modules_texts, tensor_text, value_text


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


class Holder:
    def __init__(self, net):
        self.net, self.calls = net, 0

    def __call__(self, x, t):
        self.calls += 1
        return self.net(x)

    def predict(self, x, t):
        return self.net(x)


class Pipeline:
    def __init__(self, unet):
        self.unet = unet


class Empty:
    def __call__(self, x, t):
        return GLOBAL(x)


@dataclasses.dataclass
class Slots:
    __slots__ = ("net",)
    net: nn.Module

    def __call__(self, x, t):
        return self.net(x)


def apply(net, x, t, scale=1.0):
    return scale * net(x)


def wrapped(function):
    @functools.wraps(function)
    def wrapper(*arguments):
        return function(*arguments)

    return wrapper


GLOBAL = nn.Identity().eval()


def global_model(x, t):
    return GLOBAL(x)


def set_global(net, model):
    globals()["GLOBAL"] = net
    return model


def with_default(net):
    def model(x, t, first=None, net=net):
        return net(x)

    return model


def with_keyword(net):
    def model(x, t, *, net=net):
        return net(x)

    return model


def inner(net):
    return lambda x, t: (lambda: GLOBAL(x))()


# A callable that holds a module, and where
HOLDERS = [
    ("net", lambda net: lambda x, t: net(x)),
    ("net", with_default),
    ("net", with_keyword),
    ("args[0]", lambda net: functools.partial(apply, net)),
    ("net", lambda net: functools.partial(apply, net=net)),
    ("func", lambda net: functools.partial(net, y=1)),
    ("func.self", lambda net: functools.partial(net.forward, y=1)),
    ("func.self.net.unet", lambda net: functools.partial(Holder(Pipeline(net)).predict)),
    ("func.net", lambda net: functools.partial(lambda x, t, y: net(x), y=1)),
    ("net", Holder),
    ("net", Slots),
    ("self.net", lambda net: Holder(net).predict),
    ("holder.net", lambda net: (lambda holder: lambda x, t: holder(x, t))(Holder(net))),
    ("nets[1]", lambda net: (lambda nets: lambda x, t: nets[1](x))([None, net])),
    ("nets['b']", lambda net: (lambda nets: lambda x, t: nets["b"](x))({"b": net})),
    ("holder.net[0]", lambda net: (lambda holder: lambda x, t: holder)(Holder((net,)))),
    ("__wrapped__.net", lambda net: wrapped(lambda x, t: net(x))),
    ("GLOBAL", lambda net: set_global(net, global_model)),
    ("GLOBAL", lambda net: set_global(net, inner(net))),
    ("__call__.GLOBAL", lambda net: set_global(net, Empty())),
    ("global_model.GLOBAL", lambda net: set_global(net, lambda x, t: global_model(x, t))),
]


@pytest.mark.parametrize(("where", "holder"), HOLDERS)
def test_modules_that_callables_hold(where, holder, monkeypatch):
    monkeypatch.setitem(globals(), "GLOBAL", GLOBAL)
    one, two = torch.ones(2), torch.zeros(2)
    texts = model_texts(holder(module(a=one)))
    assert texts[f"the model's {where}"] == "Module"
    assert texts[f"the model's {where}'s weights"].startswith("1 tensors, SHA-256")
    assert texts == model_texts(holder(module(a=one.clone())))
    for other in (module(a=two), module(b=one), module(a=one).train(), nn.Identity().eval()):
        assert texts != model_texts(holder(other))
    with pytest.raises(TypeError, match=r"the model's .*'s a is on the meta device"):
        model_texts(holder(module(a=torch.ones(2, device="meta"))))


def test_what_else_callables_hold():
    """Counts and caches may differ in another process; what a partial binds is an argument."""
    net = nn.Linear(2, 2)
    holder = Holder(net)
    before = model_texts(holder)
    holder(torch.ones(2), 0)
    holder.log, holder.cache, holder.itself = [1.0], {"last": [net]}, holder
    assert model_texts(holder) == before
    assert model_texts(functools.partial(apply, net, scale=2.0)) != model_texts(
        functools.partial(apply, net, scale=3.0)
    )
    bound = model_texts(functools.partial(apply, X, scale=2.0))
    assert bound["model"] == "partial of apply"
    assert bound["the model's scale"] == "2.0"
    assert bound["the model's args[0]"] == tensor_text(X, "")
    a, b = module(a=X), module(a=X + 1)
    pairs = [(a, b), (b, a), (a, a), (b, b)]
    texts = [str(model_texts(functools.partial(apply, *pair))) for pair in pairs]
    assert len(set(texts)) == 4
    assert modules_texts(None, "denoised_fn") == modules_texts(torch.tanh, "denoised_fn") == {}


def test_a_plan_in_a_function():
    torch.manual_seed(0)
    unet = UNet(UNetConfig(image_size=8, channels=(32,), attention_resolutions=())).eval()
    plan = prepare(unet)
    texts = model_texts(lambda x, t: plan(x, t))
    assert texts["the model's plan"] == "UNet"
    assert texts["the model's plan's weights"] == model_texts(unet)["the model's weights"]
    del unet
    with pytest.raises(ReferenceError, match="the model that the plan was prepared from is gone"):
        model_texts(lambda x, t: plan(x, t))


def test_found_in_the_same_places_in_another_process():
    code = (
        "import torch\nfrom torch import nn\nfrom ddpm_fast.fingerprints import model_texts\n"
        "torch.manual_seed(0)\n"
        "nets = {name: nn.Linear(1, 1) for name in 'abc'}\nz = nn.Linear(1, 1)\n"
        "print(model_texts(lambda x, t: z(nets['a'](x))))"
    )
    made = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
        for _ in range(2)
    }
    assert len(made) == 1
    assert made.pop().count(b"weights") == 4


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


def test_modules_without_tensors_may_be_made_at_a_first_call():
    class Denoiser:
        def __init__(self):
            self.net, self.act = nn.Linear(2, 2), None

        def __call__(self, x, t):
            if self.act is None:
                self.act = nn.SiLU()
            return self.act(self.net(x))

    model = Denoiser()
    before = model_texts(model)
    model(torch.zeros(1, 2), None)
    assert model_texts(model) == before
    model.net.weight.data.add_(1)
    assert model_texts(model) != before


def test_what_another_thread_changes_meanwhile():
    class Server:
        def __init__(self):
            self.net = nn.Linear(2, 2)
            self.pending = dict.fromkeys(range(900))

        def denoise(self, x, t):
            return self.net(x)

    server, stop = Server(), threading.Event()

    def serve():
        i = 900
        while not stop.is_set():
            server.pending[i] = None
            del server.pending[i - 900]
            i += 1

    thread = threading.Thread(target=serve)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread.start()
    try:
        for _ in range(100):
            assert "the model's self.net's weights" in model_texts(server.denoise)
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
