"""A model over several processes, and its blocks computed twice to save memory."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from ..nn.blocks import AttentionBlock, Downsample, ResBlock, Upsample
from .errors import RunError
from .world import World


def checkpoint_activations(model: nn.Module) -> None:
    """Keeps the inputs of each residual block and attention alone; the backward pass computes the
    rest again (Chen et al. 2016). The values are the same: dropout is a function of the sample."""
    for module in model.modules():
        if isinstance(module, (ResBlock, AttentionBlock)):
            module.forward = functools.partial(  # type: ignore[method-assign]
                checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False
            )


def distributed(model: nn.Module, world: World) -> nn.Module:
    """DistributedDataParallel: the gradients of all processes are averaged as they appear."""
    from torch.nn.parallel import DistributedDataParallel

    devices = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def shard(model: nn.Module, world: World) -> None:
    """FSDP2: each process keeps a part of every weight, gathered block by block when it is needed.

    Raises:
        RunError: this torch does not have it.
    """
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError as error:
        raise RunError("parallel fsdp needs torch 2.6 or later", 2) from error
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(world.device.type, (world.size,))
    apply: Any = fully_shard
    for module in model.modules():
        if isinstance(module, (ResBlock, AttentionBlock, Downsample, Upsample)):
            apply(module, mesh=mesh)
    apply(model, mesh=mesh)
