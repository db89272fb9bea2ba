"""One step of training, and all the state that it changes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..loss import DenoisingLoss
from ..nn import UNet
from ..sampler import Sampler
from .checkpoints import Snapshot
from .config import RunConfig
from .dropout import SampleAddress, address_dropout
from .ema import Averages
from .errors import RunError
from .loader import Batch
from .parallel import checkpoint_activations, distributed, shard
from .pictures import to_uint8
from .sharding import fill, whole
from .world import World

Parallel = Literal["ddp", "fsdp"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer:
    """Algorithm 1 of Ho et al. 2020 with all that a long run needs.

    What a step computes is a function of the config, the weights and the positions of its samples:
    (seed, sample id) gives the data's order, timesteps, noise, dropped labels and dropout.

    Args:
        config: of the run.
        world: this process among the others.
        parallel: "ddp" keeps the weights in every process, "fsdp" a part in each.

    Attributes:
        model: the network, with this process's part of the weights where they are sharded.
        sharded: whether they are.
        step_count: steps done.
        per_sample: of the latest step, the losses of each part's samples.
        pending: (step, loss, norm of the gradient) of the steps whose values were not yet read.

    Raises:
        RunError: what does not go together: a batch size and the number of processes, a precision
            and the device.
    """

    def __init__(self, config: RunConfig, world: World, parallel: Parallel = "ddp") -> None:
        self.config, self.world = config, world
        self.sharded = parallel == "fsdp"
        check(config, world, parallel)
        self.part = config.batch_size // (world.size * config.grad_accum)
        torch.manual_seed(config.seed)
        model = UNet(config.unet)
        self._address = SampleAddress(config.seed)
        address_dropout(model, self._address)
        if config.activation_checkpointing:
            checkpoint_activations(model)
        if self.sharded:
            shard(model.to(world.device), world)  # takes contiguous weights only
        else:
            model.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model = model.train()
        self._forward: nn.Module = model
        if world.size > 1 and not self.sharded:
            self._forward = distributed(model, world)
        self._names = [name for name, _ in model.named_parameters()]
        self._parameters = list(model.parameters())
        self._optimizer = self._make_optimizer()
        # The weights are the same in all processes, and so the averages would be.
        keeps_averages = world.first or self.sharded
        self.averages = Averages(self._parameters, config.ema_rates if keeps_averages else ())
        self._scaler = torch.amp.GradScaler(world.device.type, enabled=config.precision == "fp16")
        schedule, loss = config.build_schedule(), config.loss
        classes = config.unet.num_classes
        self.loss = DenoisingLoss(
            schedule,
            prediction=loss.prediction,
            variance=loss.variance,
            objective=loss.objective,
            weighting=loss.weighting,
            min_snr_gamma=loss.min_snr_gamma,
            p2_gamma=loss.p2_gamma,
            p2_k=loss.p2_k,
            vlb_weight=loss.vlb_weight,
            timestep_sampling=loss.timestep_sampling,
            group_size=config.batch_size,
            offset_noise=loss.offset_noise,
            label_dropout=0.0 if classes is None else loss.label_dropout,
            null_label=classes,
        )
        self._sampler = Sampler(
            self._call,
            schedule,
            prediction=loss.prediction,
            variance=loss.variance,
            method="ddim",
            num_steps=min(config.output.sampling_steps, len(schedule)),
            spacing="trailing",
            graph="off",  # its memory would be held while the model is trained
            device=world.device,
        )
        self.step_count = 0
        self.pending: list[tuple[int, Tensor, Tensor]] = []
        self.per_sample: list[Tensor] = []

    def positions(self) -> Iterator[range]:
        """Of each part of a batch that this process takes, from the next step on: consecutive
        samples of its share, which is a block of the whole batch."""
        batch, part = self.config.batch_size, self.part
        share = batch // self.world.size
        first = self.world.rank * share
        return (
            range(start, start + part)
            for step in range(self.step_count, self.config.steps)
            for start in range(step * batch + first, step * batch + first + share, part)
        )

    def step(self, batches: Iterator[Batch]) -> None:
        """Goes through as many parts as make this process's share, and moves the weights."""
        config, parts = self.config, self.config.grad_accum
        total: Tensor | float = 0.0
        self.per_sample = []
        for part in range(parts):
            with self._synced(part == parts - 1):
                total = total + self._part(next(batches), parts)
        self._scaler.unscale_(self._optimizer)
        self.step_count += 1
        norm = self._clip(config.optimizer.clip_norm)
        rate = config.optimizer.learning_rate_at(self.step_count)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()
        self.averages.update(self._parameters, self.step_count - 1)
        self.loss.samples_seen = self.step_count * config.batch_size
        assert isinstance(total, Tensor)
        self.pending.append((self.step_count, total, norm))

    def read(self) -> list[tuple[int, float, float]]:
        """The values of ``pending`` on the host, by one wait for the device; the loss is of this
        process's share."""
        if not self.pending:
            return []
        steps, losses, norms = zip(*self.pending, strict=True)
        self.pending = []
        if len(steps) == 1:
            return [(steps[0], losses[0].item(), norms[0].item())]
        values = torch.stack([torch.stack(losses).float(), torch.stack(norms).float()]).tolist()
        return list(zip(steps, *values, strict=True))

    @property
    def learning_rate(self) -> float:
        """Of the latest step."""
        return self.config.optimizer.learning_rate_at(self.step_count)

    def sample(self) -> Tensor:
        """Images by the first average: ids 0 … num_samples − 1 of the run's seed, by DDIM, label
        id mod the number of classes; uint8 [N, C, H, W]. With sharded weights all processes call.
        """
        unet, count = self.config.unet, self.config.output.num_samples
        labels = None
        if unet.num_classes is not None:
            labels = torch.arange(count, device=self.world.device) % unet.num_classes
        self.model.eval()
        with contextlib.ExitStack() as stack:
            stack.callback(self.model.train)
            if self.averages.shadows:
                rate = self.config.ema_rates[0]
                stack.enter_context(self.averages.swapped_in(self._parameters, rate))
            shape = [count, unet.in_channels, unet.image_size, unet.image_size]
            kwargs = {} if labels is None else {"class_labels": labels}
            x = self._sampler.sample(shape, seed=self.config.seed, model_kwargs=kwargs)
        return to_uint8(x)

    def snapshot(self) -> Snapshot | None:
        """What a run goes on from; None but in the first process. With sharded weights all call."""
        keep = self.world.first

        def named(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
            wholes = [whole(tensor, keep) for tensor in tensors]
            return {
                name: tensor
                for name, tensor in zip(self._names, wholes, strict=True)
                if tensor is not None
            }

        if not keep and not self.sharded:
            return None
        model = named(self._parameters)
        averages = {rate: named(tensors) for rate, tensors in self.averages.shadows.items()}
        optimizer = {}
        for name, parameter in zip(self._names, self._parameters, strict=True):
            for key, value in self._optimizer.state.get(parameter, {}).items():
                tensor = whole(value, keep)
                if tensor is not None:
                    optimizer[f"{key}/{name}"] = tensor
        for key, value in self.loss.state_dict().items():
            optimizer[f"loss/{key}"] = value.cpu().contiguous()
        if not keep:
            return None
        groups = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self._optimizer.param_groups
        ]
        state = {
            "optimizer": {"name": self.config.optimizer.name, "param_groups": groups},
            "scaler": self._scaler.state_dict() or None,
        }
        samples = self.loss.samples_seen
        return Snapshot(self.config, self.step_count, samples, model, averages, optimizer, state)

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Goes on from a snapshot, to the bit.

        Raises:
            RunError: one that is of another network.
        """
        found = [snapshot.model, *snapshot.averages.values()]
        if any(set(tensors) != set(self._names) for tensors in found):
            raise RunError("the checkpoint's parameters are not those of its config")
        named = list(zip(self._names, self._parameters, strict=True))
        for name, parameter in named:
            fill(parameter, snapshot.model[name])
        for rate, shadows in self.averages.shadows.items():
            for name, shadow in zip(self._names, shadows, strict=True):
                fill(shadow, snapshot.averages[rate][name])
        parameter_of = dict(named)
        for key, value in snapshot.optimizer.items():
            kind, _, name = key.partition("/")
            if kind == "loss":
                continue
            parameter = parameter_of[name]
            if value.ndim == 0:  # the step count; fused optimisers want it beside the weights
                fused = self._optimizer.defaults.get("fused")
                state = value.to(parameter.device if fused else "cpu", copy=True)
            else:
                state = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                fill(state, value)
            self._optimizer.state[parameter][kind] = state
        self.loss.load_state_dict(
            {
                key.removeprefix("loss/"): value
                for key, value in snapshot.optimizer.items()
                if key.startswith("loss/")
            }
        )
        if snapshot.state.get("scaler"):
            self._scaler.load_state_dict(snapshot.state["scaler"])
        self.step_count = snapshot.step

    def _part(self, batch: Batch, parts: int) -> Tensor:
        device = self.world.device
        images = batch.images.to(device, non_blocking=True)
        images = images.contiguous(memory_format=torch.channels_last)
        self._address.sample_ids = batch.sample_ids.to(device, non_blocking=True)
        kwargs = {}
        if self.config.unet.num_classes is not None and batch.labels is not None:
            kwargs["class_labels"] = batch.labels.to(device, non_blocking=True)
        first = int(batch.sample_ids[0])
        ids = range(first, first + len(images))
        with self._autocast():
            out = self.loss(
                self._forward, images, seed=self.config.seed, sample_ids=ids, model_kwargs=kwargs
            )
        loss = out.loss if parts == 1 else out.loss / parts
        self._scaler.scale(loss).backward()
        self.per_sample.append(out.per_sample.detach())
        return loss.detach()

    def _clip(self, limit: float | None) -> Tensor:
        """The gradient's norm, and the gradient scaled to ``limit`` where that is less."""
        if self.world.device.type == "cpu" and not self.sharded:
            # Where the norm can be looked at, most steps need no pass over the gradient.
            gradients = [p.grad for p in self._parameters if p.grad is not None]
            found = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
            if limit is not None and found > limit:
                torch._foreach_mul_(gradients, limit / (found + 1e-6))
            return found
        norm: Any = nn.utils.clip_grad_norm_(
            self._parameters, math.inf if limit is None else limit, foreach=True
        )
        whole_norm: Tensor = norm.full_tensor() if self.sharded else norm
        return whole_norm

    def _call(self, x: Tensor, t: Tensor, **kwargs: Tensor) -> Tensor:
        with self._autocast():
            output: Tensor = self.model(x, t, **kwargs)
        return output.float()

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        dtype = DTYPES.get(self.config.precision)
        if dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.world.device.type, dtype)

    def _synced(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Gradients are exchanged once a step."""
        forward: Any = self._forward
        if self.sharded:
            forward.set_requires_gradient_sync(last)
        elif not last and self.world.size > 1:
            unsynced: contextlib.AbstractContextManager[Any] = forward.no_sync()
            return unsynced
        return contextlib.nullcontext()

    def _make_optimizer(self) -> torch.optim.Optimizer:
        config = self.config.optimizer
        make = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
        return make(
            self._parameters,
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=not self.sharded,
            foreach=self.sharded,
        )


def check(config: RunConfig, world: World, parallel: Parallel) -> None:
    """Raises RunError where a config cannot be run by these processes."""
    sharded = parallel == "fsdp"
    if config.batch_size % (world.size * config.grad_accum):
        raise RunError(
            f"batch_size must be a multiple of {world.size} processes × {config.grad_accum} parts "
            f"(grad_accum); got {config.batch_size}",
            2,
        )
    if config.precision == "fp16" and sharded:
        raise RunError("precision fp16 does not work with parallel fsdp: take bf16", 2)
    if sharded and world.size == 1:
        raise RunError("parallel fsdp takes several processes: start them with torchrun", 2)
