"""Captured steps on a GPU: the loop's bits, nothing waits between them, and what cannot be captured
leaves all as it was."""

from __future__ import annotations

import gc
import threading
import types
import warnings

import pytest
import torch
from gpu_backends import backend_in_use  # noqa: F401
from unet2d_models import SMALL as THEIRS
from unet2d_models import theirs_of
from unet_weights import randomised

from ddpm_fast import NoiseSchedule, Sampler, UNet, UNetConfig, use_backend
from ddpm_fast.capture import rehearsal
from ddpm_fast.capture.captured import CapturedStep
from ddpm_fast.capture.graphs import KEPT, Graphs
from ddpm_fast.capture.rehearsal import WATCHES_AT_FIRST
from ddpm_fast.sampling import Run

pytestmark = pytest.mark.gpu

SCHEDULE = NoiseSchedule.linear()
SHAPE = (4, 3, 16, 16)
CONFIG = {"image_size": 16, "channels": (64, 128), "attention_resolutions": (8,)}


def unet(**options) -> UNet:
    torch.manual_seed(0)
    return randomised(UNet(UNetConfig(**CONFIG, **options))).cuda()


def function(x, t, shift=0.0):
    return torch.sin(2 * x) * (0.5 + t.reshape(-1, 1, 1, 1) / 2000) + shift


def diffusers_model():
    pytest.importorskip("diffusers")
    return theirs_of(THEIRS).cuda()


LABELS = {"class_labels": torch.tensor([3, 0, 9, 1])}
# Their model, the sampler's arguments, those of its call
CASES = {
    "plan": (unet, {}, {}),
    "plan in bf16": (lambda: unet().bfloat16(), {}, {}),
    "UNet": (unet, {"plan": "off"}, {}),
    "UNet in fp16": (lambda: unet().half(), {"plan": "off", "method": "ddim", "eta": 0.5}, {}),
    "classes": (lambda: unet(num_classes=10), {"guidance_scale": 2.0}, {
        "model_kwargs": LABELS, "uncond_kwargs": {"class_labels": None}}),
    "learned": (lambda: unet(out_channels=6), {"variance": "learned_range"}, {}),
    "UNet2DModel": (diffusers_model, {"plan": "off"}, {}),
    "plan of UNet2DModel": (diffusers_model, {}, {}),
    "function": (lambda: function, {"device": "cuda", "denoised_fn": torch.tanh}, {}),
    "guided function": (lambda: function, {
        "device": "cuda", "guidance_scale": 1.5, "dynamic_threshold": 0.9}, {
        "model_kwargs": {"shift": torch.full((1, 3, 1, 1), 0.2)}, "uncond_kwargs": {}}),
    "start": (lambda: function, {}, {
        "x_T": torch.linspace(-1, 1, 3072).view(SHAPE).to(memory_format=torch.channels_last),
        "start": 3}),
    "seeds": (unet, {}, {"seed": torch.tensor([5, -1, 5, 7]), "sample_ids": [4, 2**40, 1, 0]}),
}  # fmt: skip


def on_gpu(value):
    if isinstance(value, torch.Tensor):
        return value.cuda()
    return {key: on_gpu(each) for key, each in value.items()} if isinstance(value, dict) else value


def drawn(sampler, **kwargs):
    kwargs = {"seed": 7, **on_gpu(kwargs)}
    states = [t for step in sampler.stream(SHAPE, **kwargs) for t in (step.x, step.x0)]
    return [*states, sampler.sample(SHAPE, **kwargs), pasted(sampler, **kwargs)]


def pasted(sampler, **kwargs):
    def paste(step):
        step.x[..., :3] = 0.25

    return sampler.sample(SHAPE, callback=paste, **kwargs)


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a.is_cuda
        assert torch.equal(a, b)
        assert a.stride() == b.stride()


OURS = "sampling step by step, without a graph|the model has changed"


def silent(call):
    """What it returns without a word of ours; PyTorch has its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", OURS)
        return call()


def sampler_of(model, **kwargs):
    return Sampler(model, SCHEDULE, **{"num_steps": 20, "device": "cuda", **kwargs})


@pytest.mark.parametrize("name", CASES)
def test_bits_of_the_loop(name):
    of, arguments, call = CASES[name]
    sampler = sampler_of(of(), **arguments)
    for seed in (1, 2**63 + 1):
        arguments = {"seed": seed, **call}
        sampler.graph = "off"
        expected = drawn(sampler, **arguments)
        sampler.graph = "auto"
        assert_same(silent(lambda arguments=arguments: drawn(sampler, **arguments)), expected)
    assert len(sampler._graphs._kept) == 2
    assert all(sampler._graphs._kept.values())


@pytest.mark.parametrize("steps", [3, 8])
def test_several_steps_a_graph(steps, monkeypatch):
    monkeypatch.setattr("ddpm_fast.capture.graphs.STEPS", steps)
    sampler = sampler_of(unet(), graph="off")
    expected = sampler.sample(SHAPE, seed=1)
    sampler.graph = "auto"
    assert torch.equal(silent(lambda: sampler.sample(SHAPE, seed=1)), expected)
    assert torch.equal(sampler.sample(SHAPE, seed=1), expected)


@pytest.mark.parametrize("every_state", [False, True])
def test_nothing_waits_between_steps(every_state):
    sampler = sampler_of(unet())
    steps = Run(sampler, SHAPE, 0, None, None, None, None, None).steps(every_state)
    next(steps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(19):
            x = next(steps).x
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert next(steps, None) is None
    assert len(sampler._graphs._kept) == 1
    assert torch.equal(x, sampler_of(sampler.model, graph="off").sample(SHAPE))


def test_progress(capsys):
    sampler_of(unet(), num_steps=100).sample(SHAPE, progress=True)
    assert "100/100" in capsys.readouterr().err


def test_memory_is_bounded():
    sampler, held = sampler_of(unet(), num_steps=16), []
    for _ in range(3):
        for n in range(1, 8):
            sampler.sample((n, 3, 16, 16))
        gc.collect()
        torch.cuda.empty_cache()
        held.append(torch.cuda.memory_reserved())
    assert len(sampler._graphs._kept) == KEPT
    assert held[2] <= held[1] + 2**21
    del sampler
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < held[0]


def test_streams_one_after_the_other():
    sampler = sampler_of(unet())
    expected = sampler_of(sampler.model, graph="off").sample(SHAPE)
    for stream in (torch.cuda.Stream(), torch.cuda.default_stream(), torch.cuda.Stream()):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = sampler.sample(SHAPE)
            left = sampler.stream(SHAPE, seed=4)
            next(left)
        left.close()  # on another stream
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.equal(found, expected)
        assert torch.equal(sampler.sample(SHAPE), expected)


def test_threads(on):
    """On streams of their own, with samplers of their own and a common one, while others allocate
    and wait for the device."""
    common = sampler_of(unet())
    expected = [sampler_of(common.model, graph="off").sample(SHAPE, seed=seed) for seed in range(3)]
    common.sample(SHAPE)  # makes the plan
    torch.cuda.synchronize()
    wrong: list[object] = []
    done = threading.Event()

    def draw(seed, sampler):
        try:
            with use_backend(on), torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(10):
                    if not torch.equal(sampler.sample(SHAPE, seed=seed), expected[seed]):
                        wrong.append(seed)
        except BaseException as error:
            wrong.append(error)
            raise

    def disturb():
        try:
            while not done.is_set():
                torch.ones(1000, 1000, device="cuda").sum().item()
        except BaseException as error:
            wrong.append(error)
            raise

    others = threading.Thread(target=disturb)
    others.start()
    threads = [
        threading.Thread(target=draw, args=(seed, sampler))
        for seed in range(3)
        for sampler in (common, sampler_of(common.model))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    done.set()
    others.join()
    assert not wrong
    assert not any(thread.is_alive() for thread in threads)


def test_others_draw_random_numbers_meanwhile():
    """Of PyTorch's, which before 2.13 marks their state while a graph is captured."""
    drawn_there: list[object] = []

    def draw():
        try:
            drawn_there.append(torch.randn(1000, device="cuda").std().item())
        except BaseException as error:
            drawn_there.append(error)

    def watched(x, t):
        if torch.cuda.is_current_stream_capturing():
            thread = threading.Thread(target=draw)
            thread.start()
            thread.join(60)
        return function(x, t)

    sampler = sampler_of(watched)
    state = torch.cuda.get_rng_state()
    silent(lambda: sampler.sample(SHAPE))
    assert len(drawn_there) == 1
    assert isinstance(drawn_there[0], float), drawn_there
    after = torch.randn(5, device="cuda")
    torch.cuda.set_rng_state(state)
    torch.randn(1000, device="cuda")
    assert torch.equal(torch.randn(5, device="cuda"), after)


@pytest.mark.parametrize("first", [True, False])
def test_captures_inside_inference_mode_and_out(first):
    """Whoever captures first, or plays what another captured."""
    sampler = sampler_of(unet())
    off = sampler_of(sampler.model, graph="off")
    for count, inside in ((4, first), (3, not first), (4, not first), (3, first)):
        shape = (count, *SHAPE[1:])
        with torch.inference_mode(inside), warnings.catch_warnings():
            warnings.filterwarnings("error", OURS)
            found = sampler.sample(shape)
        assert torch.equal(found, off.sample(shape))
    assert len(sampler._graphs._kept) == 2
    assert all(sampler._graphs._kept.values())


def test_graphs_have_cublas_memory_of_their_own():
    """Not that of a stream on which others multiply before and afterwards."""
    torch.manual_seed(0)
    weight = torch.randn(SHAPE[-1], SHAPE[-1], device="cuda") / SHAPE[-1] ** 0.5
    streams = [torch.cuda.Stream() for _ in range(32)]  # all that PyTorch has
    big = torch.randn(512, 4096, device="cuda")

    def multiply():
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                (big @ big.T).sum()
            torch.cuda.current_stream().wait_stream(stream)

    multiply()
    sampler = sampler_of(lambda x, t: function(x @ weight, t))
    expected = sampler_of(sampler.model, graph="off").sample(SHAPE)
    for _ in range(2):
        assert torch.equal(silent(lambda: sampler.sample(SHAPE)), expected)
        multiply()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        taken = [torch.full((1 << 22,), float("nan"), device="cuda") for _ in range(8)]
        assert torch.equal(silent(lambda: sampler.sample(SHAPE)), expected)
        del taken
    assert all(sampler._graphs._kept.values())


def refused(sampler, message):
    sampler.graph = "off"
    expected = drawn(sampler)
    sampler.graph = "auto"
    with pytest.warns(UserWarning, match=message) as seen:
        assert_same(drawn(sampler), expected)
    assert sum('graph="off" silences' in str(each.message) for each in seen) == 1
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.randn(3, device="cuda").isfinite().all()
    other = sampler_of(function)
    silent(lambda: other.sample(SHAPE))
    assert all(other._graphs._kept.values())


def test_models_that_wait():
    refused(sampler_of(lambda x, t: function(x, t) * x.mean().item()), "aten._local_scalar_dense")
    refused(sampler_of(lambda x, t: function(x, t) + len(x.nonzero())), "aten.nonzero, which waits")
    refused(sampler_of(lambda x, t: function(x, t) + t.cpu()[0].cuda()), "aten._to_copy, which")
    refused(sampler_of(lambda x, t: function(x, t) * t.tolist()[0]), "step cannot be captured")


def test_captures_that_fail(monkeypatch):
    """What the rehearsal does not see breaks the capture itself, and nothing else."""
    copies = sampler_of(lambda x, t: function(x, t) + torch.tensor([0.5], device="cuda"))
    for _ in range(3):
        refused(copies, "step cannot be captured: .*test_gpu_graph.py, line")
        copies._graphs = Graphs()
    monkeypatch.setattr(rehearsal, "_why_not", lambda *_: "")
    refused(sampler_of(lambda x, t: function(x, t) * x.mean().item()), "captured: .*\\.item")
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    refused(sampler_of(lambda x, t: function(x, t) * x.mean().item()), "captured: .*\\.item")
    gc.collect()
    assert torch.cuda.memory_allocated() <= held + 2**21


def test_models_that_are_no_functions():
    counted = types.SimpleNamespace(calls=0)

    def counting(x, t):
        counted.calls += 1
        return function(x, t) * (1 + 1e-6 * counted.calls)

    sampler = sampler_of(counting)
    with pytest.warns(UserWarning, match="depends on more than its arguments and weights"):
        sampler.sample(SHAPE)
    before = counted.calls
    silent(lambda: sampler.sample(SHAPE))
    assert counted.calls == before + 20
    with pytest.warns(UserWarning, match="aten.randn_like, which draws random numbers"):
        sampler_of(lambda x, t: function(x, t) + torch.randn_like(x)).sample(SHAPE)


def test_models_that_write():
    """What a step counts is counted once a step, and by the loop."""

    def logging(x, t, log):
        log += 1
        return function(x, t)

    log = torch.zeros(1, device="cuda")
    sampler = sampler_of(logging)
    with pytest.warns(UserWarning, match="aten.add_, which writes to a tensor among the model's"):
        sampler.sample(SHAPE, model_kwargs={"log": log})
    assert log.item() == 20

    def counting(x, t):
        log.add_(1)
        return function(x, t)

    with pytest.warns(UserWarning, match="aten.add_, which changes what was there before the step"):
        sampler_of(counting).sample(SHAPE)
    if WATCHES_AT_FIRST:
        assert log.item() == 40
    again = torch.empty(SHAPE, device="cuda")
    sampler = sampler_of(lambda x, t: again.copy_(function(x, t)))
    expected = sampler_of(function, graph="off").sample(SHAPE)
    assert torch.equal(silent(lambda: sampler.sample(SHAPE)), expected)
    assert all(sampler._graphs._kept.values())


def test_arguments_have_their_strides():
    shift = torch.linspace(-1, 1, 4 * 6, device="cuda").view(4, 6)[:, 1::2, None, None]
    sampler = sampler_of(function, graph="off")
    expected = sampler.sample(SHAPE, model_kwargs={"shift": shift})
    sampler.graph = "auto"
    found = silent(lambda: sampler.sample(SHAPE, model_kwargs={"shift": shift}))
    assert torch.equal(found, expected)
    (step,) = sampler._graphs._kept.values()
    assert step.kwargs["shift"].stride() == shift.stride()


def test_weights_that_change():
    for plan in ("auto", "off"):
        model = unet()
        sampler = sampler_of(model, plan=plan)
        before = sampler.sample(SHAPE)
        for change in (
            lambda model=model: model.conv_out.weight.mul_(1.5),
            lambda model=model: setattr(model.conv_in, "weight", torch.nn.Parameter(
                1.2 * model.conv_in.weight)),
        ):  # fmt: skip
            with torch.no_grad():
                change()
            found = sampler.sample(SHAPE)
            assert not torch.equal(found, before)
            off = sampler_of(model, plan=plan, graph="off")
            assert torch.equal(found, off.sample(SHAPE))
            before = found


def test_autocast():
    sampler = sampler_of(unet())
    with torch.autocast("cuda", torch.bfloat16):
        found = sampler.sample(SHAPE)
        again = sampler.sample(SHAPE)
        expected = sampler_of(sampler.model, graph="off").sample(SHAPE)
    assert torch.equal(found, expected)
    assert torch.equal(again, expected)
    assert not torch.equal(sampler.sample(SHAPE), expected)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_models(mode):
    """Those that have graphs of their own may not be captured, or be."""
    model = torch.compile(function, mode=mode)
    expected = sampler_of(model, graph="off").sample(SHAPE)
    sampler = sampler_of(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error" if mode == "default" else "ignore", OURS)
        for _ in range(2):
            assert torch.equal(sampler.sample(SHAPE), expected)


def test_not_enough_memory(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB")

    sampler = sampler_of(unet(), graph="off")
    expected = sampler.sample(SHAPE)
    sampler.graph = "auto"
    with monkeypatch.context() as patch:
        patch.setattr(CapturedStep, "compare", full)
        with pytest.warns(UserWarning, match="not enough memory for a captured step"):
            assert torch.equal(sampler.sample(SHAPE), expected)
    assert torch.equal(silent(lambda: sampler.sample(SHAPE)), expected)
