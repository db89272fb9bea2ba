"""What of diffusers' UNet2DModel there is a plan of, and what is refused."""

from __future__ import annotations

import pytest
import torch
from unet2d_models import SMALL as THEIRS
from unet2d_models import theirs_of

from ddpm_fast import prepare

pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def theirs():
    return theirs_of(THEIRS)


def test_options_without_an_equivalent():
    for change, message in (
        ({"act_fn": "gelu"}, "UNet2DModel's option act_fn='gelu' has no equivalent"),
        ({"time_embedding_type": "fourier"}, "option time_embedding_type='fourier'"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(theirs_of({**THEIRS, **change}))


def test_any_sample_size():
    for size in (None, (8, 12)):
        model = theirs_of({**THEIRS, "sample_size": size})
        x = torch.randn(2, 3, 8, 12)
        with torch.no_grad():
            expected = model(x, 5).sample
        assert (prepare(model)(x, 5) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_return_dict_is_taken(theirs):
    x, plan = torch.zeros(2, 3, 8, 8), prepare(theirs)
    assert torch.equal(plan(x, 5, return_dict=False), plan(x, 5))
    with pytest.raises(TypeError, match="unexpected keyword argument 'labels'"):
        plan(x, 5, labels=None)


def test_other_processors_and_free_u(theirs):
    from diffusers.models.attention_processor import AttnProcessor

    attention = theirs.mid_block.attentions[0]
    before = attention.processor
    attention.set_processor(AttnProcessor())
    with pytest.raises(ValueError, match=r"processor of mid_block\.attentions\.0 is 'AttnProc"):
        prepare(theirs)
    attention.set_processor(before)
    prepare(theirs)
    for block in theirs.up_blocks:
        block.s1 = 0.9
    with pytest.raises(ValueError, match=r"FreeU on up_blocks\.0"):
        prepare(theirs)


def test_offloaded(theirs):
    accelerate = pytest.importorskip("accelerate")

    accelerate.cpu_offload(theirs, torch.device("cpu"))
    with pytest.raises(ValueError, match="by which accelerate or diffusers moves weights"):
        prepare(theirs)


def test_subclasses(theirs):
    class Another(type(theirs)):
        pass

    theirs.__class__ = Another
    with pytest.raises(TypeError, match="not of a subclass"):
        prepare(theirs)
