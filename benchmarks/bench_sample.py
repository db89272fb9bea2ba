"""The end-to-end loop: whole trajectories of DDIM around a small UNet, seconds a call by system,
for several batches and sides. Each system computes the same network with the same weights, from
noise to images, as its users call it. The network predicts x_0: with random weights, images of an
ε prediction are all black and white, whatever is wrong with a step."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch._inductor.config
from comparison import compiled_network, short_of_memory, whole_calls
from correctness import agree
from eager import EagerDdim
from peers import Missing, Wrapped, diffusers, lucidrains_diffusion, openai_diffusion
from results import OURS
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ddpm_fast import NoiseSchedule, Sampler, UNet, UNetConfig, randn

SCHEDULE = NoiseSchedule.linear()
STEPS = {False: 50, True: 20}  # by --quick
# (side, images)
CASES = {
    "cpu": [(32, 1), (32, 4), (32, 16), (64, 1)],
    "cuda": [(32, 1), (32, 16), (32, 256), (64, 1), (64, 64)],
}
QUICK_CASES = [(16, 1), (16, 8), (32, 1)]
QUICK_COMPILED = (16, 8)
# A compilation takes up to a minute.
COMPILED = {
    "cpu": [(32, 1), (32, 4), (32, 16), (64, 1)],
    "cuda": [(32, 1), (32, 256), (64, 1), (64, 64)],
}
BOTH_LAYOUTS = 32  # the largest side; beyond, that which suits convolutions, and in quick runs
LAST = torch.channels_last
CHANNELS = {False: (32, 64, 64), True: (32, 64)}  # by --quick
CHECKED = 2  # images of each call, against float64
TOLERANCE = 1e-4  # of pixels in [-1, 1], after all steps


@dataclass(frozen=True)
class System:
    """What draws images, and what they have to be: DDIM's from x_T through the timesteps."""

    call: Callable[[], Any]
    x_T: Callable[[], Tensor]
    timesteps: Sequence[int]
    images: Callable[[Any], Tensor] = lambda found: found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        config = metafunc.config
        cases = CASES[config.getoption("--device")]
        metafunc.parametrize("case", QUICK_CASES if config.getoption("--quick") else cases, ids=str)


@functools.cache
def network(side: int, quick: bool, device: torch.device) -> UNet:
    """With weights that make of close inputs close outputs, as trained ones do."""
    config = UNetConfig(
        image_size=side,
        channels=CHANNELS[quick],
        num_res_blocks=1,
        attention_resolutions=(side // 2,),
    )
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    unet = UNet(config).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return unet.to(device)


def flops_of(unet: UNet, shape: tuple[int, ...]) -> int:
    """Of one evaluation, as the module computes it."""
    x = torch.zeros(shape, device=unet.conv_in.weight.device, dtype=unet.conv_in.weight.dtype)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(x, torch.zeros(shape[0], dtype=torch.int64, device=x.device))
    return counter.get_total_flops()


def systems(
    unet: UNet, shape: tuple[int, ...], device: torch.device, quick: bool, compile_too: bool
) -> dict[str, System | Missing]:
    """Plain PyTorch, torch.compile and diffusers with the network in both layouts of memory."""
    n, steps = shape[0], STEPS[quick]
    last = copy.deepcopy(unet).to(memory_format=LAST)
    layouts = {"": unet, ", channels_last": last}
    if quick or shape[-1] > BOTH_LAYOUTS:
        del layouts[""]
    leading = range(len(SCHEDULE) - len(SCHEDULE) // steps, -1, -(len(SCHEDULE) // steps))
    eager = EagerDdim(SCHEDULE, leading, device)

    def start() -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)

    sampler = Sampler(
        unet, SCHEDULE, prediction="sample", method="ddim", num_steps=steps, device=device
    )
    found: dict[str, System | Missing] = {
        OURS: System(
            lambda: sampler.sample(shape, seed=0),
            lambda: randn(shape, seed=0, device=device),
            leading,
        ),
    }

    def around(network: Callable[..., Tensor], is_last: bool) -> System:
        """The loop in plain PyTorch; what a network returns may lie otherwise than what it took."""
        format_ = LAST if is_last else torch.contiguous_format

        def laid(x: Tensor, t: Tensor) -> Tensor:
            return network(x.contiguous(memory_format=format_), t)

        return System(lambda: eager(laid, start()), start, leading)

    for layout, network in layouts.items():
        found[f"eager{layout}"] = around(network, network is last)
    for layout, network in layouts.items() if compile_too else ():
        whole = compiled_network(network)
        is_missing = isinstance(whole, Missing)
        found[f"torch.compile{layout}"] = whole if is_missing else around(whole, network is last)
    for layout, network in layouts.items():
        found[f"diffusers{layout}"] = of_diffusers(network, n, start, leading)
    found["lucidrains"] = of_lucidrains(unet, shape, device, steps)
    openai = openai_diffusion("FIXED_SMALL", mean="START_X", respacing=f"ddim{steps}")
    found["OpenAI"] = System(
        lambda: openai.ddim_sample_loop(unet, shape, noise=start(), device=device), start, leading
    )
    return found


def of_diffusers(
    unet: UNet, n: int, start: Callable[[], Tensor], timesteps: Sequence[int]
) -> System | Missing:
    """DDIMPipeline around their UNet2DModel."""
    package = diffusers()
    if isinstance(package, Missing):
        return package
    network = unet.to_diffusers()
    if unet.conv_in.weight.is_contiguous(memory_format=LAST):
        network.to(memory_format=LAST)
    pipeline = package.DDIMPipeline(network, package.DDIMScheduler(prediction_type="sample"))
    pipeline.set_progress_bar_config(disable=True)

    def call() -> Any:
        return pipeline(
            batch_size=n,
            generator=torch.Generator().manual_seed(0),
            num_inference_steps=len(timesteps),
            use_clipped_model_output=True,  # as the others take it
            output_type="np",
        ).images

    def images(found: Any) -> Tensor:
        return torch.from_numpy(found).permute(0, 3, 1, 2) * 2 - 1

    return System(call, start, timesteps, images)


def of_lucidrains(
    unet: UNet, shape: tuple[int, ...], device: torch.device, steps: int
) -> System | Missing:
    """GaussianDiffusion around the network as it is: DDIM of their own timesteps."""
    diffusion = lucidrains_diffusion(
        Wrapped(unet, shape[1]), shape[2], device, objective="pred_x0", sampling_timesteps=steps
    )
    if isinstance(diffusion, Missing):
        return diffusion
    silence(diffusion)
    times = torch.linspace(-1, len(SCHEDULE) - 1, steps + 1).int().tolist()

    def call() -> Tensor:
        torch.manual_seed(0)
        return diffusion.sample(shape[0])

    def start() -> Tensor:
        torch.manual_seed(0)
        return torch.randn(shape, device=device)

    timesteps = tuple(reversed(times[1:]))
    return System(call, start, timesteps, lambda found: found * 2 - 1)


def silence(diffusion: Any) -> None:
    """No progress bars in what is timed."""
    import sys

    sys.modules[type(diffusion).__module__].tqdm = lambda steps, **kwargs: steps


def check(name: str, system: System, double: UNet, device: torch.device) -> None:
    """Against the whole trajectory in float64, of the first images."""
    exact = EagerDdim(SCHEDULE, system.timesteps, device, torch.float64)
    found = system.images(system.call())
    with torch.inference_mode():
        expected = exact(double, system.x_T()[:CHECKED].double())
    agree(name, found[:CHECKED], expected.clamp(-1, 1), atol=TOLERANCE)


def bench_sample(record, case, device, quick):
    side, n = case
    shape = (n, 3, side, side)
    why = short_of_memory(device, 2_000_000_000)
    if why:
        pytest.skip(f"{why}: the end-to-end loop")
    unet, steps = network(side, quick, device), STEPS[quick]
    compile_too = case == QUICK_COMPILED if quick else case in COMPILED[device.type]
    state = torch.empty(shape, device="meta")
    name = f"sample, {'tiny' if quick else 'small'} UNet, DDIM"
    frozen = device.type == "cpu" and not quick  # which takes twice as long to compile
    with torch._inductor.config.patch(freezing=frozen), torch.inference_mode():
        running = record.running(systems(unet, shape, device, quick, compile_too))
        double = UNet(unet.config).to(device, torch.float64).eval()
        double.load_state_dict(unet.state_dict())
        with record.checking(name, state):
            for each, system in running.items():
                check(each, system, double, device)
        calls = {each: system.call for each, system in running.items()}
        rounds = whole_calls(calls, device, 2.0 if quick else 12.0, 3)
    flops = steps * flops_of(unet, shape)
    record(name, state, rounds, images=n, steps=steps, flops=flops)
