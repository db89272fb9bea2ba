"""What stands before lucidrains' GaussianDiffusion once it is accelerated: the forward process and
the loss, eqs. 4 and 14 of Ho et al. 2020, weighted as its ``loss_weight`` says."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...loss import OFFSET_STREAM
from ...ops import add_noise, randn
from ...ops.add_noise import STREAM
from ...ops.checks import FLOAT_DTYPES
from ..accelerated import Accelerated
from ..noise import Address
from ..regression import regression_loss
from .tables import PREDICTIONS, Tables

UNUSED: Address = (0, None)  # where torch draws
FLOAT64 = "its tensors are float64, which the kernels do not take"
_DATA_GRADIENT = "p_losses of an x_start or noise that requires grad"
_IN_LOSSES = ("q_sample", "predict_v")  # what p_losses stands for, model_predictions it calls


class _Batch(NamedTuple):
    """What p_losses has made before it calls the model."""

    x: Tensor  # x_t
    noise: Tensor | None  # ε with its offset; None where it lies at the address
    offset: Tensor | None  # [N, C, 1, 1] to be added to ε at the address
    address: Address
    takes: bool  # whether the kernels take these arguments
    coin: bool  # whether the model is to see a first x̂₀
    is_stock: bool  # whether the stock method does the rest


class FastTraining(Accelerated):
    """GaussianDiffusion's q_sample and p_losses on the fused kernels."""

    # What the stock class has.
    _buffers: dict[str, Any]
    _tables: Tables
    model: Callable[..., Tensor]
    model_predictions: Callable[..., Any]
    predict_v: Callable[[Tensor, Tensor, Tensor], Tensor]
    noise_assignment: Callable[[Tensor, Tensor], Tensor]
    device: torch.device
    objective: str
    self_condition: bool
    immiscible: bool
    offset_noise_strength: float

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The stock method, which knows of no count: warns where the seed's noise begins anew."""
        source = self.noise_source
        if source.seed is not None and source.consumed == 0:
            self._tables.say_once(
                "a state_dict has no count of the samples trained on: with a seed, training now "
                "begins with the noise of sample 0. Where it goes on, say where: "
                "set_noise(seed=..., consumed=step * batch * accumulation * processes)"
            )
        return super().load_state_dict(*args, **kwargs)  # type: ignore[misc]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Of torch: also where it is a part of what is loaded."""
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[misc]
        self._tables.drop()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Of torch, below to(), half() and the like."""
        applied = super()._apply(*args, **kwargs)  # type: ignore[misc]
        self._tables.drop()
        return applied

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """√ᾱ_t x_0 + √(1−ᾱ_t) ε; addressed noise is that of the next samples to train on."""
        if torch.compiler.is_compiling():
            from .uncompiled import x_t_of
        else:
            x_t_of = FastTraining._x_t
        return x_t_of(self, x_start, t, noise)

    def _x_t(self, x_start: Tensor, t: Tensor, noise: Tensor | None) -> Tensor:
        address = self._training_address(x_start) if noise is None else UNUSED
        return self._noised(x_start, t, noise, address, self._takes(x_start, t, noise))

    def p_losses(
        self,
        x_start: Tensor,
        t: Tensor,
        noise: Tensor | None = None,
        offset_noise_strength: float | None = None,
        loss_reduction: str = "mean",
    ) -> Tensor:
        """The weighted squared error of the model's prediction; [N] of it for "none"."""
        if torch.compiler.is_compiling():
            from .uncompiled import batch_of, loss_of
        else:
            batch_of, loss_of = FastTraining._batch, FastTraining._loss
        batch = batch_of(self, x_start, t, noise, offset_noise_strength)
        if batch.is_stock:
            loss: Tensor = super().p_losses(x_start, t, batch.noise, 0.0, loss_reduction)  # type: ignore[misc]
            return loss
        x_self_cond = None
        if batch.coin:
            with torch.no_grad():
                x_self_cond = self.model_predictions(batch.x, t).pred_x_start.detach()
        output = self.model(batch.x, t, x_self_cond)
        return loss_of(self, output, x_start, t, batch, loss_reduction)

    def _batch(
        self, x_start: Tensor, t: Tensor, noise: Tensor | None, offset_strength: float | None
    ) -> _Batch:
        samples, channels, _, _ = x_start.shape
        strength = self.offset_noise_strength if offset_strength is None else offset_strength
        addressed = self.noise_source.is_addressed
        address = UNUSED
        if noise is None or strength > 0:
            address = self._training_address(x_start)
        takes = self._takes(x_start, t, noise)
        is_stock = self._has_its_own(_IN_LOSSES)
        if noise is None and (is_stock or not (addressed and takes and not self.immiscible)):
            noise = self._noise_like(x_start, address)
        offset = None
        if strength > 0:
            shape = (samples, channels)
            if addressed:
                offset = drawn(shape, address, torch.float32, x_start.device, OFFSET_STREAM)
            else:
                offset = torch.randn(shape, device=self.device)
            offset = strength * offset[:, :, None, None]
            if noise is not None:
                noise += offset
                offset = None
        if is_stock:
            return _Batch(x_start, noise, None, address, takes, False, is_stock)
        x = self._noised(x_start, t, noise, address, takes)
        if offset is not None:
            x += self._extract("sqrt_one_minus_alphas_cumprod", t) * offset
        coin = self.self_condition and random.random() < 0.5
        return _Batch(x, noise, offset, address, takes, coin, is_stock)

    def _loss(
        self, output: Tensor, x_start: Tensor, t: Tensor, batch: _Batch, loss_reduction: str
    ) -> Tensor:
        noise, offset = batch.noise, batch.offset
        total = loss_reduction != "none"
        weights = self._buffers["loss_weight"].gather(-1, t)
        if weights.dtype != torch.float64:
            weights = weights.float()
        if total:
            weights = weights / x_start.shape[0]
        dtype = torch.promote_types(output.dtype, batch.x.dtype)
        if batch.takes and self._loss_is_fused(output, x_start, noise):
            if offset is not None and self.objective == "pred_noise":
                output = output - offset
            elif offset is not None and self.objective == "pred_v":
                output = output - self._extract("sqrt_alphas_cumprod", t) * offset
            loss = regression_loss(
                output,
                t,
                self._tables.forward(self._buffers),
                PREDICTIONS[self.objective],
                x_start,
                noise,
                batch.address,
                weights,
                total,
            )
        else:
            if noise is None:
                noise = self._noise_like(x_start, batch.address)
                noise = noise if offset is None else noise + offset
            loss = self._loss_by_formula(output, x_start, t, noise, weights)
            loss = loss.sum() if total else loss
        return loss.to(dtype)

    def _loss_is_fused(self, output: Tensor, x_start: Tensor, noise: Tensor | None) -> bool:
        """Whether the kernel takes the model's output; warns where it could not differentiate."""
        if output.dtype == torch.float64:
            self._tables.warn_once(FLOAT64)
        if output.dtype not in FLOAT_DTYPES or output.shape != x_start.shape:
            return False
        if torch.is_grad_enabled() and (
            (x_start.requires_grad and self.objective != "pred_noise")
            or (noise is not None and noise.requires_grad)
        ):
            self._tables.warn_once(_DATA_GRADIENT)
            return False
        return True

    def _loss_by_formula(
        self, output: Tensor, x_start: Tensor, t: Tensor, noise: Tensor, weights: Tensor
    ) -> Tensor:
        """Of each sample: its weight times the mean of (target − m)²."""
        target = noise
        if self.objective == "pred_x0":
            target = x_start
        elif self.objective == "pred_v":
            target = self.predict_v(x_start, t, noise)
        return weights * F.mse_loss(output, target, reduction="none").flatten(1).mean(1)

    def _noised(
        self,
        x_start: Tensor,
        t: Tensor,
        noise: Tensor | None,
        address: Address,
        takes: bool,
        index: int = 0,
    ) -> Tensor:
        """q_sample, with its noise at the address where it is drawn there.

        takes: whether the kernels take these arguments.
        """
        if noise is None and not (takes and self.noise_source.is_addressed and not self.immiscible):
            noise = self._noise_like(x_start, address, index)
        if not takes or (noise is not None and noise.requires_grad):
            noised: Tensor = super().q_sample(x_start, t, noise)  # type: ignore[misc]
            return noised
        if self.immiscible:
            with torch.autocast("cuda", enabled=False):
                noise = noise[self.noise_assignment(x_start, noise)]  # type: ignore[index, arg-type]
        return add_noise(
            x_start,
            t,
            self._tables.forward(self._buffers),
            noise=noise,
            dtype=torch.promote_types(x_start.dtype, self._buffers["betas"].dtype),
            seed=address[0],
            sample_ids=address[1],
            index=index,
        )

    def _takes(self, x_start: Tensor, t: Tensor, noise: Tensor | None) -> bool:
        """Whether the kernels take these, or noise like x_start; warns of float64."""
        if torch._C._are_functorch_transforms_active():
            return False
        betas = self._buffers["betas"].dtype
        if (
            x_start.dtype in FLOAT_DTYPES
            and betas in FLOAT_DTYPES
            and (noise is None or (noise.dtype in FLOAT_DTYPES and noise.shape == x_start.shape))
        ):
            return t.dtype == torch.int64 and t.shape == x_start.shape[:1]
        if torch.float64 in (x_start.dtype, betas, None if noise is None else noise.dtype):
            self._tables.warn_once(FLOAT64)
        return False

    def _has_its_own(self, methods: Iterable[str]) -> bool:
        """Whether this object has got methods of its own among these since it was accelerated;
        warns of them."""
        own = [name for name in methods if name in self.__dict__]
        if own:
            self._tables.warn_once(f"this object has got its own {', '.join(own)}")
        return bool(own)

    def _noise_like(self, x_start: Tensor, address: Address, index: int = 0) -> Tensor:
        if not self.noise_source.is_addressed:
            return torch.randn_like(x_start)
        if not x_start.is_floating_point():  # which torch.randn_like refuses as well
            raise TypeError(f"x_start must be a float tensor; got {x_start.dtype}")
        return drawn(x_start.shape, address, x_start.dtype, x_start.device, STREAM, index)

    def _training_address(self, x_start: Tensor) -> Address:
        source = self.noise_source
        if not source.is_addressed:
            return UNUSED
        return source.of_training(x_start.shape[0], x_start.device)

    def _extract(self, table: str, t: Tensor) -> Tensor:
        return self._buffers[table].gather(-1, t)[:, None, None, None]


def drawn(
    shape: Sequence[int],
    address: Address,
    dtype: torch.dtype,
    device: torch.device,
    stream: int,
    index: int = 0,
) -> Tensor:
    """The noise of an address in any float dtype."""
    seed, ids = address
    drawn_dtype = dtype if dtype in FLOAT_DTYPES else torch.float32
    noise = randn(
        shape, seed=seed, sample_ids=ids, stream=stream, index=index, dtype=drawn_dtype,
        device=device,
    )  # fmt: skip
    return noise.to(dtype)
