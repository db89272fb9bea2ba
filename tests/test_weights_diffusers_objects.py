"""UNets from diffusers' objects as they are used: in a pipeline, compiled, offloaded."""

from __future__ import annotations

import pytest
import torch
from unet2d_models import SMALL, theirs_of
from unet_weights import assert_same_weights

from ddpm_fast import UNet

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def small():
    return theirs_of(SMALL)


def pipeline_of(unet):
    return diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())


def test_compiled_and_in_a_pipeline(small):
    expected = UNet.from_diffusers(small)
    compiled = torch.compile(small, backend="eager")
    assert type(compiled) is not type(small)
    in_pipeline = pipeline_of(small)
    both = pipeline_of(small)
    both.unet = compiled
    for source in (compiled, in_pipeline, both):
        found = UNet.from_diffusers(source)
        assert found.config == expected.config
        assert_same_weights(found, expected)
    found = UNet.from_diffusers(both, image_size=16)
    assert found.config.image_size == 16


def test_objects_of_another_kind(small):
    class Pipeline:  # of another network
        unet = torch.nn.Linear(2, 2)

    named = "a UNet2DModel, a pipeline that has one, or a directory; got "
    for source, got in (
        (torch.nn.Linear(2, 2), "Linear"),
        (Pipeline(), "Linear in .*Pipeline"),
        (torch.compile(torch.nn.Linear(2, 2)), "Linear in OptimizedModule"),
        (None, "NoneType"),
        (small.state_dict(), "OrderedDict"),
    ):
        with pytest.raises(TypeError, match=f"{named}{got}$"):
            UNet.from_diffusers(source)


@pytest.mark.parametrize("whole", [True, False])
def test_offloaded_weights_are_refused(small, whole):
    """Their parameters are on the meta device: there is nothing to copy."""
    hooks = pytest.importorskip("accelerate.hooks")
    accelerate = pytest.importorskip("accelerate")
    expected = UNet.from_diffusers(small)
    accelerate.cpu_offload(small if whole else small.mid_block)
    with pytest.raises(ValueError, match=r"weights are offloaded .* remove the hooks first"):
        UNet.from_diffusers(small)
    hooks.remove_hook_from_module(small, recurse=True)
    assert_same_weights(UNet.from_diffusers(small), expected)


def test_an_offloaded_pipeline(small):
    """As enable_sequential_cpu_offload leaves it, which itself asks for an accelerator."""
    accelerate = pytest.importorskip("accelerate")
    expected = UNet.from_diffusers(small)
    pipeline = pipeline_of(small)
    accelerate.cpu_offload(pipeline.unet, torch.device("cpu"), offload_buffers=True)
    with pytest.raises(ValueError, match=r"pipeline\.remove_all_hooks\(\)"):
        UNet.from_diffusers(pipeline.unet)
    pipeline.remove_all_hooks()
    assert_same_weights(UNet.from_diffusers(pipeline.unet), expected)


def test_weights_that_were_never_there():
    with torch.device("meta"):
        theirs = diffusers.UNet2DModel(**SMALL)
    with pytest.raises(ValueError, match="no values, on the meta device"):
        UNet.from_diffusers(theirs)


def test_weights_offloaded_to_disk(small, tmp_path):
    """Group offloading leaves parameters of their shape with nothing in them."""
    small.enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_type="leaf_level",
        offload_to_disk_path=str(tmp_path),
    )
    with pytest.raises(ValueError, match=rf"are in files of {tmp_path}: load the model again"):
        UNet.from_diffusers(small)


def test_weights_offloaded_in_memory(small):
    """Group offloading to the CPU leaves them in place."""
    expected = UNet.from_diffusers(small)
    small.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    assert_same_weights(UNet.from_diffusers(small), expected)


def test_the_global_generator_is_left_alone(small):
    torch.manual_seed(3)
    expected = torch.randn(3)
    torch.manual_seed(3)
    UNet.from_diffusers(small)
    assert torch.equal(torch.randn(3), expected)
