"""accelerate and Sampler.from_pipeline on diffusers' pipelines, in memory and on disk."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from diffusers import (  # noqa: E402
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    PNDMScheduler,
    UNet2DModel,
)
from fast_scheduler_cases import FAST, generator  # noqa: E402

from ddpm_fast import Sampler, accelerate, randn  # noqa: E402
from ddpm_fast.integrations import diffusers as integration  # noqa: E402
from ddpm_fast.integrations.noise import NoiseSource  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

PIPELINES = {DDPMPipeline: DDPMScheduler, DDIMPipeline: DDIMScheduler}
SAMPLE = {"num_inference_steps": 6, "output_type": "pt", "batch_size": 2}


def tiny_unet(out_channels=3):
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        out_channels=out_channels,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()


def pipe_of(cls, scheduler=None, **config):
    pipe = cls(unet=tiny_unet(), scheduler=PIPELINES[cls](**config))
    if scheduler is not None:
        pipe.scheduler = scheduler
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe, **more):
    return pipe(**{**SAMPLE, "generator": generator(4), **more}).images


@pytest.mark.parametrize("cls", PIPELINES)
@pytest.mark.parametrize("several", [False, True])
def test_the_same_images_from_the_same_generators(cls, several):
    drawn = [generator(1), generator(2)] if several else generator(1)
    more = {"eta": 0.6, "use_clipped_model_output": True} if cls is DDIMPipeline else {}
    expected = images(pipe_of(cls), generator=drawn, **more)
    pipe = accelerate(pipe_of(cls))
    drawn = [generator(1), generator(2)] if several else generator(1)
    found = images(pipe, generator=drawn, **more)
    assert (found - expected).abs().max() < 2e-5
    assert expected.std() > 0.05


@pytest.mark.parametrize("cls", PIPELINES)
def test_torchs_noise_gives_what_it_gave(cls):
    more = {"eta": 1.0} if cls is DDIMPipeline else {}
    results = []
    for pipe in (pipe_of(cls), accelerate(pipe_of(cls), noise="torch")):
        torch.manual_seed(7)
        results.append(images(pipe, generator=None, **more))
    assert (results[0] - results[1]).abs().max() < 2e-5


def test_addressed_noise_differs_from_call_to_call_unless_it_has_a_seed():
    pipe = accelerate(pipe_of(DDPMPipeline))
    start = {"generator": None}
    torch.manual_seed(1)
    one, two = images(pipe, **start), images(pipe, **start)
    assert (one - two).abs().max() > 0.1
    torch.manual_seed(1)
    assert torch.equal(images(pipe, **start), one)  # the seed itself is torch's
    assert accelerate(pipe, seed=5) is pipe
    assert pipe.scheduler.noise_source == NoiseSource(seed=5)


@pytest.mark.parametrize("cls", PIPELINES)
def test_what_is_replaced_and_what_is_not(cls):
    pipe = pipe_of(cls, beta_schedule="squaredcos_cap_v2")
    old, unet = pipe.scheduler, pipe.unet
    old.set_timesteps(17)
    assert accelerate(pipe) is pipe
    fast = pipe.scheduler
    assert type(old) is PIPELINES[cls]  # another pipeline may have it
    assert type(fast) is FAST[PIPELINES[cls]]
    assert pipe.unet is unet
    assert fast.alphas_cumprod is old.alphas_cumprod
    assert fast.timesteps is old.timesteps
    assert fast.config == old.config
    assert tuple(pipe.config["scheduler"]) == ("diffusers", PIPELINES[cls].__name__)
    accelerate(pipe, seed=3)
    assert pipe.scheduler is fast


@pytest.mark.parametrize("stock", FAST)
def test_a_scheduler_itself_becomes_the_fast_one(stock):
    scheduler = stock()
    assert accelerate(scheduler, seed=2) is scheduler
    assert type(scheduler) is FAST[stock]
    assert scheduler.noise_source.seed == 2
    with pytest.raises(TypeError, match="belong to pipelines"):
        accelerate(stock(), dtype=torch.bfloat16)


def test_a_pipelines_subclass_is_a_pipeline():
    class Mine(DDPMPipeline):
        pass

    pipe = Mine(unet=tiny_unet(), scheduler=DDPMScheduler())
    assert type(accelerate(pipe).scheduler) is FAST[DDPMScheduler]


def test_the_unets_dtype_and_layout_are_opted_into():
    pipe = pipe_of(DDPMPipeline)
    accelerate(pipe)
    assert pipe.unet.dtype == torch.float32
    weight = pipe.unet.conv_in.weight
    assert weight.is_contiguous()
    expected = images(pipe)
    accelerate(pipe, memory_format=torch.channels_last)
    assert pipe.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert (images(pipe) - expected).abs().max() < 1e-4
    with pytest.warns(RuntimeWarning, match='output_type="pt"') as caught:
        accelerate(pipe, dtype=torch.bfloat16)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert images(pipe).dtype == torch.bfloat16


class Other(DDPMScheduler):
    def step(self, *arguments, **more):
        return super().step(*arguments, **more)


@pytest.mark.parametrize(
    ("make", "options", "error", "words"),
    [
        (lambda: Other(), {}, TypeError, "Other, a subclass, whose steps may be its own"),
        (lambda: PNDMScheduler(), {}, TypeError, "PNDMScheduler; ddpm_fast knows diffusers'"),
        (None, {"dtype": "bf16"}, TypeError, "dtype must be float32.*'bf16'"),
        (None, {"memory_format": torch.channels_last_3d}, TypeError, "memory_format must be"),
        (None, {"memory_layout": 3}, TypeError, "memory_layout"),
        (None, {"noise": "philox"}, ValueError, "noise must be"),
    ],
)
def test_a_failure_leaves_the_pipeline_as_it_was(make, options, error, words):
    pipe = pipe_of(DDPMPipeline, None if make is None else make())
    scheduler, state = pipe.scheduler, dict(pipe.scheduler.__dict__)
    dtype, weight = pipe.unet.dtype, pipe.unet.conv_in.weight.data_ptr()
    with pytest.raises(error, match=words):
        accelerate(pipe, **options)
    assert pipe.scheduler is scheduler
    assert pipe.scheduler.__dict__ == state
    assert pipe.unet.dtype == dtype
    assert pipe.unet.conv_in.weight.data_ptr() == weight


def test_a_unet_that_cannot_be_moved_whole_is_not_moved(monkeypatch):
    pipe = pipe_of(DDPMPipeline)
    pipe.unet.conv_in.register_buffer("kept", torch.ones(3))  # moved before conv_out
    before = {name: t for name, t in pipe.unet.state_dict().items()}
    scheduler = pipe.scheduler

    def broken(fn, recurse=True):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(pipe.unet.conv_out, "_apply", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        accelerate(pipe, dtype=torch.bfloat16)
    assert pipe.scheduler is scheduler
    for name, tensor in pipe.unet.state_dict().items():
        assert tensor.dtype == torch.float32
        assert tensor.data_ptr() == before[name].data_ptr()


@pytest.fixture
def another_version(monkeypatch):
    integration.check_library.cache_clear()
    yield monkeypatch
    integration.check_library.cache_clear()


@pytest.mark.parametrize("version", ["0.39.2", "0.12.0.dev0"])
def test_an_old_version_is_refused(another_version, version):
    pipe = pipe_of(DDPMPipeline)
    another_version.setattr(diffusers, "__version__", version)
    with pytest.raises(RuntimeError, match=rf"diffusers {version}: it is too old; .* 0.40 to 0.42"):
        accelerate(pipe)
    assert type(pipe.scheduler) is DDPMScheduler


def test_a_later_version_is_known_by_what_its_schedulers_take(another_version):
    another_version.setattr(diffusers, "__version__", "1.3.0")
    accelerate(pipe_of(DDPMPipeline))
    integration.check_library.cache_clear()

    def step(self, model_output, timestep, sample, noise=None):
        raise AssertionError

    another_version.setattr(DDIMScheduler, "step", step)
    with pytest.raises(RuntimeError, match=r"DDIMScheduler.step takes \(self, model_output"):
        accelerate(pipe_of(DDPMPipeline))


def test_what_diffusers_makes_of_the_components_is_stock():
    """Its constructor makes a scheduler of its own class anew: accelerate comes last."""
    pipe = accelerate(pipe_of(DDPMPipeline))
    for made in (DDIMPipeline(**pipe.components), DDIMPipeline.from_pipe(pipe)):
        assert type(made.scheduler) is DDIMScheduler
        assert type(accelerate(made).scheduler) is FAST[DDIMScheduler]


@pytest.mark.parametrize("cls", PIPELINES)
def test_trailing_steps_that_end_below_zero(cls):
    """The stock list ends with −1 for 61 steps, and its ᾱ wraps around."""
    more = {"num_inference_steps": 61}
    stock = pipe_of(cls, timestep_spacing="trailing")
    fast = accelerate(pipe_of(cls, timestep_spacing="trailing"))
    found, expected = images(fast, **more), images(stock, **more)
    assert stock.scheduler.timesteps[-1] == -1
    assert found.isfinite().all()
    if cls is DDPMPipeline:  # without noise this model takes roundings to another image
        assert (found - expected).abs().max() < 1e-4


def test_importing_the_package_does_not_import_diffusers():
    code = (
        "import sys, ddpm_fast, ddpm_fast.integrations.diffusers\n"
        "ddpm_fast.integrations.diffusers.recognises(3)\n"
        "assert 'diffusers' not in sys.modules, 'imported'"
    )
    child(code)


def child(code, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def digest(tensor):
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


LOAD_WITHOUT_AND_WITH_DDPM_FAST = """
import hashlib, sys, torch
sys.modules["ddpm_fast"] = None  # importing it fails
import diffusers
def digests(pipe):
    pipe.set_progress_bar_config(disable=True)
    for _ in range(2):
        drawn = torch.Generator().manual_seed(4)
        found = pipe(batch_size=2, num_inference_steps=6, output_type="pt", generator=drawn).images
        print(hashlib.sha256(found.numpy().tobytes()).hexdigest())
pipes = [getattr(diffusers, name).from_pretrained(sys.argv[1] + name) for name in sys.argv[2:]]
for pipe in pipes:
    assert type(pipe.scheduler) in (diffusers.DDPMScheduler, diffusers.DDIMScheduler)
    digests(pipe)
del sys.modules["ddpm_fast"]
import ddpm_fast
for pipe in pipes:
    digests(ddpm_fast.accelerate(pipe))
"""


def test_saved_and_loaded_in_a_new_interpreter(tmp_path):
    """Without ddpm_fast it is the stock pipeline and gives its images; accelerated there it gives
    those of the pipeline that was saved, twice."""
    stock, fast = [], []
    for cls in PIPELINES:
        pipe = pipe_of(cls, beta_schedule="squaredcos_cap_v2")
        stock += [digest(images(pipe))] * 2
        accelerate(pipe)
        fast += [digest(images(pipe))] * 2
        pipe.save_pretrained(tmp_path / cls.__name__)
    assert stock != fast
    names = [cls.__name__ for cls in PIPELINES]
    found = child(LOAD_WITHOUT_AND_WITH_DDPM_FAST, f"{tmp_path}/", *names)
    assert found.split()[-8:] == stock + fast


class TestFromPipeline:
    @pytest.mark.parametrize("cls", PIPELINES)
    def test_draws_what_the_pipeline_draws(self, cls):
        """To the rounding of its float32 tables."""
        pipe = pipe_of(cls)
        pipe.scheduler.set_timesteps(20)
        sampler = Sampler.from_pipeline(pipe)
        x_T = randn((2, 3, 8, 8), seed=3)
        found = sampler.sample((2, 3, 8, 8), seed=3)
        accelerate(pipe, seed=3)
        x = x_T
        with torch.no_grad():
            for t in pipe.scheduler.timesteps:
                x = pipe.scheduler.step(pipe.unet(x, t).sample, t, x).prev_sample
        assert (found - x).abs().max() < 1e-3
        assert found.std() > 0.1

    def test_takes_the_schedulers_settings(self):
        pipe = pipe_of(
            DDPMPipeline,
            prediction_type="v_prediction",
            variance_type="fixed_large",
            clip_sample_range=2.0,
            timestep_spacing="trailing",
        )
        before = dict(pipe.scheduler.__dict__)
        sampler = Sampler.from_pipeline(pipe, num_steps=8)
        assert sampler.model is pipe.unet
        assert sampler.table.prediction == "v_prediction"
        assert sampler.table.variance == "fixed_large"
        assert sampler.clip == (-2.0, 2.0)
        assert sampler.table.timesteps.tolist() == [999, 874, 749, 624, 499, 374, 249, 124]
        assert pipe.scheduler.__dict__ == before

    def test_a_schedulers_threshold_goes_along(self):
        pipe = pipe_of(DDPMPipeline, thresholding=True, sample_max_value=1.5)
        sampler = Sampler.from_pipeline(pipe, num_steps=4)
        assert sampler.clip is None
        assert sampler.sample((2, 3, 8, 8)).isfinite().all()

    def test_a_scheduler_needs_a_model(self):
        with pytest.raises(TypeError, match="holds no model"):
            Sampler.from_pipeline(DDPMScheduler())
        sampler = Sampler.from_pipeline(DDIMScheduler(), model=tiny_unet(), num_steps=5)
        assert sampler.table.method == "ddim"
        assert len(sampler) == 5

    @pytest.mark.parametrize(
        ("variance", "words"),
        [
            ("learned", "second half is σ²"),
            ("fixed_large_log", "its noise is NaN"),
            ("other", "variance_type='other'; it has fixed_small"),
        ],
    )
    def test_a_variance_that_sampler_does_not_have(self, variance, words):
        with pytest.raises(ValueError, match=words):
            Sampler.from_pipeline(pipe_of(DDPMPipeline, variance_type=variance))
        assert Sampler.from_pipeline(pipe_of(DDPMPipeline, variance_type="fixed_small_log"))

    @pytest.mark.parametrize("num_steps", [61, 103, 121])
    @pytest.mark.parametrize("cls", PIPELINES)
    def test_the_minus_one_of_a_trailing_list_is_left_out(self, cls, num_steps):
        pipe = pipe_of(cls, timestep_spacing="trailing")
        pipe.scheduler.set_timesteps(num_steps)
        assert pipe.scheduler.timesteps.tolist()[-1] == -1
        for sampler in (
            Sampler.from_pipeline(pipe),
            Sampler.from_pipeline(pipe, num_steps=num_steps),
        ):
            assert len(sampler) == num_steps
            assert sampler.table.timesteps.tolist() == pipe.scheduler.timesteps.tolist()[:-1]

    @pytest.mark.parametrize(
        ("num_steps", "error", "words"),
        [
            (0, ValueError, r"num_steps must lie in 1 … 1000; got 0"),
            (-3, ValueError, "got -3"),
            (1001, ValueError, "got 1001"),
            (2.5, TypeError, "num_steps must be an integer; got 2.5"),
        ],
    )
    @pytest.mark.parametrize("cls", PIPELINES)
    def test_no_number_of_steps(self, cls, num_steps, error, words):
        with pytest.raises(error, match=words):
            Sampler.from_pipeline(pipe_of(cls), num_steps=num_steps)

    def test_an_offloaded_pipeline_says_where_it_computes(self, monkeypatch):
        pipe = pipe_of(DDPMPipeline)
        assert Sampler.from_pipeline(pipe).device is None
        elsewhere = property(lambda self: torch.device("cuda", 1))
        monkeypatch.setattr(DDPMPipeline, "_execution_device", elsewhere)
        assert Sampler.from_pipeline(pipe).device == torch.device("cuda", 1)
        assert Sampler.from_pipeline(pipe, device="cpu").device == torch.device("cpu")
        assert Sampler.from_pipeline(pipe, model=tiny_unet()).device is None

    def test_a_model_without_its_weights(self):
        pipe = pipe_of(DDPMPipeline)
        pipe.unet.to("meta")
        with pytest.raises(ValueError, match="on meta, as sequential offloading leaves them"):
            Sampler.from_pipeline(pipe)

    def test_another_scheduler(self):
        with pytest.raises(TypeError, match="PNDMScheduler"):
            Sampler.from_pipeline(pipe_of(DDPMPipeline, PNDMScheduler()))
