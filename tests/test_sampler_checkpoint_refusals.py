"""What a sample() that keeps its state refuses: other calls, and how they differ; other folders."""

from __future__ import annotations

import errno
import functools
import os
import sys
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_cases import (
    SCHEDULE,
    SHAPE,
    X_T,
    Net,
    Stop,
    forked,
    sampler_of,
    stops_at,
    undisturbed,
    unet,
)
from test_states import count_to
from torch import nn

from ddpm_fast import NoiseSchedule, Sampler, UNet, UNetConfig, prepare, randn, states
from ddpm_fast.locking import InUseError
from ddpm_fast.states import StateFolder, write_state

pytestmark = pytest.mark.usefixtures("one_thread")


def of_seed(seed: int) -> Net:
    model = Net().eval()
    with torch.no_grad():
        model.scale[seed] += 1e-6  # not among the parameters, nor in state_dict()
    return model


def of_heads(heads: int) -> UNet:
    torch.manual_seed(1)
    config = UNetConfig(
        image_size=8, in_channels=2, channels=(16, 16), num_res_blocks=1, norm_groups=4,
        attention_resolutions=(4,), num_heads=heads,
    )  # fmt: skip
    return UNet(config).eval()


TIMESTEPS = [90, 60, 30, 0]
Y, Z = torch.tensor([0, 1, 2]), torch.tensor([0, 1, 3])
GUIDED = {"model_kwargs": {"y": Y}, "uncond_kwargs": {"y": Z}}
# What differs, as the error names it; the Sampler's and sample()'s arguments, here and there
DIFFERENCES: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ("shape: [3, 2, 8, 8] there, [2, 2, 8, 8] here", {}, {}, {}, {"shape": [2, 2, 8, 8]}),
    ("seed: 0 there, 1 here", {}, {}, {}, {"seed": 1}),
    ("seed: int64 [3], SHA-256", {}, {"seed": Y}, {}, {"seed": Z}),
    ("seed: 7 there, int64 [3], SHA-256", {}, {"seed": 7}, {}, {"seed": Z}),
    ("sample_ids: int64 [3], SHA-256", {}, {"sample_ids": Z}, {}, {"sample_ids": [0, 1, 4]}),
    ("sample_ids: 0 … 2 there, int64 [3]", {}, {}, {}, {"sample_ids": [7, 8, 9]}),
    ("sample_ids: 0 … 2 there, int64 [3]", {}, {}, {}, {"sample_ids": [1, 0, 2]}),
    ("x_T: float32 [3, 2, 8, 8], SHA-256", {}, {"x_T": X_T}, {}, {"x_T": X_T + 1}),
    ("x_T: None there, float32", {}, {}, {}, {"x_T": randn(SHAPE, seed=0)}),
    ("channels_last here", {}, {"x_T": X_T}, {},
     {"x_T": X_T.contiguous(memory_format=torch.channels_last)}),
    ("start: 0 there, 1 here", {}, {"x_T": X_T}, {}, {"x_T": X_T, "start": 1}),
    ("the timesteps: 88 … 0, int64 [12]", {}, {}, {"num_steps": 10}, {}),
    ("the timesteps:", {"timesteps": TIMESTEPS}, {}, {"timesteps": [91, *TIMESTEPS[1:]]}, {}),
    ("the schedule's betas: float64 [100]", {}, {},
     {"schedule": NoiseSchedule.cosine(100)}, {}),
    ("prediction: epsilon there, sample here", {}, {}, {"prediction": "sample"}, {}),
    ("variance: fixed_small there, fixed_large", {}, {}, {"variance": "fixed_large"}, {}),
    ("method: ddpm there, ddim here", {}, {}, {"method": "ddim"}, {}),
    ("eta: 0.0 there, 0.5 here", {"method": "ddim"}, {}, {"method": "ddim", "eta": 0.5}, {}),
    ("eps_source: x0 there, model here", {"method": "ddim"}, {},
     {"method": "ddim", "eps_source": "model"}, {}),
    ("clip: (-1.0, 1.0) there, (-1.0, 2.0) here", {}, {}, {"clip": (-1, 2)}, {}),
    ("clip: (-1.0, 1.0) there, None here", {}, {}, {"clip": None}, {}),
    ("dynamic_threshold: None there, 0.9 here", {}, {}, {"dynamic_threshold": 0.9}, {}),
    ("denoised_fn: None there, a function here", {}, {}, {"denoised_fn": torch.tanh}, {}),
    ("guidance_scale: 2.0 there, 3.0", {"guidance_scale": 2}, GUIDED,
     {"guidance_scale": 3.0}, GUIDED),
    ("guidance_scale: 2.0 there, float32 [3], SHA", {"guidance_scale": 2}, GUIDED,
     {"guidance_scale": torch.tensor([2.0, 2.0, 3.0])}, GUIDED),
    ("uncond_kwargs['y']: int64 [3], SHA", {"guidance_scale": 2}, GUIDED,
     {"guidance_scale": 2}, {**GUIDED, "uncond_kwargs": {"y": Y}}),
    ("model_timesteps: None there, int64 [100]", {}, {},
     {"model_timesteps": list(range(100))}, {}),
    ("model_kwargs['y']: int64 [3], SHA-256", {}, {"model_kwargs": {"y": Y}}, {},
     {"model_kwargs": {"y": Z}}),
    ("model_kwargs['y']: absent there,", {}, {}, {}, {"model_kwargs": {"y": Y}}),
    ("model_kwargs['a']: 1 there, True here", {}, {"model_kwargs": {"a": 1}}, {},
     {"model_kwargs": {"a": True}}),
    ("model_kwargs['a']: [1, 2.0] there, [1, 2] here", {}, {"model_kwargs": {"a": [1, 2.0]}},
     {}, {"model_kwargs": {"a": [1, 2]}}),
    ("model_kwargs['a']: {'b': 'c'} there, {'b': 'd'}", {},
     {"model_kwargs": {"a": {"b": "c"}}}, {}, {"model_kwargs": {"a": {"b": "d"}}}),
    ("the model's weights: 6 tensors", {"model": of_seed(0)}, {}, {"model": of_seed(1)}, {}),
    ("the model's weights:", {}, {}, {"model": Net().eval().half()}, {}),
    ("the model's dtype: torch.float32 there, torch.bfloat16 here", {}, {},
     {"model": Net().eval().bfloat16()}, {}),
    ("model: Net there, Net.forward here", {}, {}, {"model": Net().eval().forward}, {}),
    ("model: Net there, Net, in training mode here", {}, {}, {"model": Net()}, {}),
    ("the model's config: {'attention_res", {"model": of_heads(1)}, {},
     {"model": of_heads(2)}, {}),
    ("the plan: channels_last", {"model": unet()}, {}, {"model": unet(), "plan": "off"}, {}),
    ("the plan: channels_last", {"model": unet()}, {},
     {"model": unet(), "plan": ["time_table"]}, {}),
    ("the backend: cpu there, reference here", {}, {}, {"backend": "reference"}, {}),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:the model is in training mode")
@pytest.mark.parametrize(
    ("named", "sampler", "call", "other_sampler", "other_call"), DIFFERENCES,
    ids=[difference[0].split(": ")[0] for difference in DIFFERENCES],
)  # fmt: skip
def test_another_call_is_refused(tmp_path, named, sampler, call, other_sampler, other_call):
    def sample(arguments, call, **more):
        arguments = {"model": Net().eval(), "schedule": SCHEDULE, "num_steps": 12, **arguments}
        if "timesteps" in arguments:
            del arguments["num_steps"]
        return Sampler(**arguments).sample(**{"shape": SHAPE, **call}, **more)

    with pytest.raises(Stop):
        sample(sampler, call, checkpoint=tmp_path, callback=stops_at(2))
    before = (tmp_path / "state.json").read_bytes()
    with pytest.raises(ValueError, match="holds the state of something else") as refused:
        sample(other_sampler, other_call, checkpoint=tmp_path)
    assert named in str(refused.value)
    assert (tmp_path / "state.json").read_bytes() == before
    found = sample(sampler, call, checkpoint=tmp_path)
    assert torch.equal(found, sample(sampler, call))


def test_another_network_in_a_function_is_refused(tmp_path):
    """As it is usually wrapped: in a lambda or a partial, perhaps by name alone."""

    def call(net, x, t):
        return net(x, t)

    for number, model in enumerate(
        (lambda net: lambda x, t: net(x, t), lambda net: functools.partial(call, net))
    ):
        folder = tmp_path / str(number)
        with pytest.raises(Stop):
            sampler_of(model(of_seed(0))).sample(SHAPE, checkpoint=folder, callback=stops_at(3))
        for _ in range(2):  # where it is half done, and where it is done
            with pytest.raises(ValueError, match=r"the model's .*'s weights: 6 tensors, SHA-256"):
                sampler_of(model(of_seed(1))).sample(SHAPE, checkpoint=folder)
            found = sampler_of(model(of_seed(0))).sample(SHAPE, checkpoint=folder)
        assert torch.equal(found, sampler_of(of_seed(0)).sample(SHAPE))


def test_another_network_in_denoised_fn_is_refused(tmp_path):
    def sample(net):
        sampler = sampler_of(denoised_fn=lambda x0: net(x0, torch.zeros(3, dtype=torch.int64)))
        return sampler.sample(SHAPE, checkpoint=tmp_path)

    found = sample(of_seed(0))
    with pytest.raises(ValueError, match="denoised_fn's net's weights: 6 tensors"):
        sample(of_seed(1))
    assert torch.equal(sample(of_seed(0)), found)


def test_a_plan_is_known_by_its_model(tmp_path):
    model = unet()
    plan = prepare(model)
    expected = sampler_of(plan).sample(SHAPE)
    with pytest.raises(Stop):
        sampler_of(plan).sample(SHAPE, checkpoint=tmp_path, callback=stops_at(3))
    assert torch.equal(sampler_of(prepare(model)).sample(SHAPE, checkpoint=tmp_path), expected)
    del model
    with pytest.raises(ReferenceError, match=r"the model that the plan was prepared .* is gone"):
        sampler_of(plan).sample(SHAPE, checkpoint=tmp_path)


EQUAL = {
    "nothing": None, "flag": True, "text": "ü", "number": 1 / 3, "list": [1, (2.0, {"a": Y})],
    "array": np.arange(3), "scalar": np.float32(0.1), "dtype": torch.bfloat16,
    "set": {"x", "y", "z"}, "bytes": b"\0\1", "long": list(range(1000)),
}  # fmt: skip


def test_equal_arguments_are_the_same_call(tmp_path):
    """By value, not by identity, order or memory layout."""
    with pytest.raises(Stop):
        sampler_of(clip=(-1, 1)).sample(
            SHAPE, checkpoint=tmp_path, callback=stops_at(3), model_kwargs=EQUAL
        )
    again = dict(reversed(EQUAL.items()))
    again["list"] = [1, (2.0, {"a": torch.arange(6)[::2] // 2})]
    again["array"] = np.arange(6)[::2] // 2
    found = sampler_of(clip=(-1.0, 1.0)).sample(SHAPE, checkpoint=tmp_path, model_kwargs=again)
    assert torch.equal(found, undisturbed("plain"))
    other = {**EQUAL, "long": [*range(999), 0]}
    with pytest.raises(ValueError, match=r"model_kwargs\['long'\]: \[0, 1, .*SHA-256"):
        sampler_of().sample(SHAPE, checkpoint=tmp_path, model_kwargs=other)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (print, r"model_kwargs\['a'\] is a builtins.builtin_function_or_method, which another"),
        ([0, {"b": object()}], r"model_kwargs\['a'\]\[1\]\['b'\] is a builtins.object"),
        (nn.Identity(), r"is a torch.nn.modules.linear.Identity"),
        (torch.Generator(), r"is a torch._C.Generator"),
        (torch.zeros(2, device="meta"), r"model_kwargs\['a'\] is on the meta device"),
        (torch.zeros(2, 2).to_sparse(), r"model_kwargs\['a'\] is torch.sparse_coo"),
        (np.array([object()]), r"is a numpy.ndarray"),
    ],
)
def test_arguments_that_cannot_be_told_apart(tmp_path, value, message):
    sampler = sampler_of()
    with pytest.raises(TypeError, match=message):
        sampler.sample(SHAPE, checkpoint=tmp_path / "new", model_kwargs={"a": value})
    assert sampler.model.calls == 0
    assert not (tmp_path / "new").exists()
    sampler.sample(SHAPE, model_kwargs={"a": value})  # as ever


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"checkpoint_every": 0}, ValueError, "checkpoint_every must be at least 1; got 0"),
        ({"checkpoint_every": 1.5}, TypeError, "checkpoint_every"),
        ({"checkpoint": 7}, TypeError, "checkpoint must be the path of a folder; got 7"),
    ],
)
def test_wrong_arguments(tmp_path, arguments, error, message):
    sampler = sampler_of()
    with pytest.raises(error, match=message):
        sampler.sample(SHAPE, **{"checkpoint": tmp_path, **arguments})
    assert sampler.model.calls == 0


def test_folders_of_something_else(tmp_path):
    sampler = sampler_of()
    write_state(tmp_path / "session", "session", {}, {})
    with pytest.raises(ValueError, match="of kind 'session', not 'sample'"):
        sampler.sample(SHAPE, checkpoint=tmp_path / "session")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds no state but something else \(notes.txt\)"):
        sampler.sample(SHAPE, checkpoint=tmp_path / "full")
    with pytest.raises(NotADirectoryError, match=r"notes\.txt is a file"):
        sampler.sample(SHAPE, checkpoint=tmp_path / "full" / "notes.txt")
    assert os.listdir(tmp_path / "full") == ["notes.txt"]
    assert sampler.model.calls == 0


def test_a_damaged_state_is_not_gone_on_from(tmp_path):
    with pytest.raises(Stop):
        sampler_of().sample(SHAPE, checkpoint=tmp_path, callback=stops_at(3))
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-8] + bytes(8))
    sampler = sampler_of()
    with pytest.raises(ValueError, match=rf"{path.name} is damaged"):
        sampler.sample(SHAPE, checkpoint=tmp_path)
    assert sampler.model.calls == 0


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("operation", range(6))
def test_what_cannot_be_written_is_told_before_the_first_step(tmp_path, there, operation):
    """A folder of a file system that is read-only, whether there is a state in it or not."""
    if there:
        with pytest.raises(Stop):
            sampler_of().sample(SHAPE, checkpoint=tmp_path, callback=stops_at(3))

    def fail():
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    sampler = sampler_of()
    with pytest.MonkeyPatch.context() as patch:
        # What is read of a state comes before what is written
        count_to(operation + (3 if there else 0), patch, fail)
        with pytest.raises(OSError, match="Read-only file system"):
            sampler.sample(SHAPE, checkpoint=tmp_path)
    assert sampler.model.calls == 0
    assert torch.equal(sampler_of().sample(SHAPE, checkpoint=tmp_path), undisturbed("plain"))


def test_without_safetensors(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    sampler = sampler_of()
    with pytest.raises(ImportError, match="pip install safetensors"):
        sampler.sample(SHAPE, checkpoint=tmp_path)
    assert sampler.model.calls == 0


def test_what_is_done_is_read_by_any_number(tmp_path):
    """From a folder that nothing can be written to, or that somebody holds."""
    expected = sampler_of().sample(SHAPE, checkpoint=tmp_path)
    with StateFolder(tmp_path, "sample"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(states, "write_bytes", None)
        patch.setattr(states, "FileLock", None)
        assert torch.equal(sampler_of().sample(SHAPE, checkpoint=tmp_path), expected)


def test_another_process_goes_on_meanwhile(tmp_path, monkeypatch):
    """After the state was read and before the folder is held."""
    with pytest.raises(Stop):
        sampler_of().sample(SHAPE, checkpoint=tmp_path, callback=stops_at(3))
    enter = StateFolder.__enter__

    def enter_after_another(self):
        monkeypatch.undo()
        with pytest.raises(Stop):
            sampler_of().sample(SHAPE, checkpoint=tmp_path, callback=stops_at(8))
        return enter(self)

    monkeypatch.setattr(StateFolder, "__enter__", enter_after_another)
    sampler = sampler_of()
    assert torch.equal(sampler.sample(SHAPE, checkpoint=tmp_path), undisturbed("plain"))
    assert sampler.model.calls == 12 - 8


def test_two_at_once(tmp_path):
    """The second is refused at once, in this process or in another, and the first goes on."""
    refused: list[str] = []
    statuses: list[int] = []

    def another():
        try:
            sampler_of().sample(SHAPE, checkpoint=tmp_path)
        except InUseError as error:
            os._exit(7 if f"another process (pid {os.getppid()})" in str(error) else 8)

    def callback(step):
        if step.step == 4:
            try:
                sampler_of().sample(SHAPE, checkpoint=tmp_path)
            except InUseError as error:
                refused.append(str(error))
            statuses.append(forked(another))

    found = sampler_of().sample(SHAPE, checkpoint=tmp_path, callback=callback)
    assert statuses == [7]
    assert len(refused) == 1
    assert refused[0].endswith("is in use by another call in this process")
    assert torch.equal(found, undisturbed("plain"))
