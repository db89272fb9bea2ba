"""DenoisingLoss: what a model is trained by, with all randomness a function of (seed, sample id).

L_simple is eq. 14 of Ho et al. 2020, the bound eq. 5, their hybrid section 3.1 of Nichol & Dhariwal
2021. ε is drawn where it is used, by each kernel anew, and never stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from . import reference
from .model import Model, call_model
from .ops.add_noise import add_noise
from .ops.checks import (
    FLOAT_DTYPES,
    as_int,
    check_range_on_host,
    noise_address,
    per_sample_int,
    reference_address,
)
from .ops.denoising_loss import denoising_loss
from .ops.randn import randn
from .ops.vlb_terms import hybrid_loss, vlb_terms
from .schedule import NoiseSchedule, Prediction, Variance, integer, one_of
from .timesteps import LABEL_DROP_STREAM, ConsecutiveIds, LossSecondMoment, TimestepWeights
from .vlb_table import vlb_rows

Objective = Literal["simple", "vlb", "hybrid"]
Weighting = Literal["min_snr", "p2"]
TimestepSampling = Literal["uniform", "antithetic", "loss_second_moment"]

OFFSET_STREAM = 5


@dataclass(frozen=True)
class LossOutput:
    """What :class:`DenoisingLoss` returns.

    Attributes:
        loss: 0-d float32, the batch's mean of ``per_sample``, with timesteps drawn by importance
            each over T times its probability. Call ``backward()`` on this one.
        per_sample: float32 [N]; each sample's value is the same in any batch.
        t: int64 [N], the timesteps.
    """

    loss: Tensor
    per_sample: Tensor
    t: Tensor


class DenoisingLoss:
    """Noises a batch, asks the model, and measures what it says.

    Everything random about a sample is a function of the seed and of its id, the count of samples
    consumed before it, which the loss keeps: a run is a function of its seed, whatever the batch
    size, and goes on where ``state_dict`` left it.

    Args:
        schedule: of the forward process.
        prediction: what the model returns: "epsilon", "sample" (x_0) or "v_prediction".
        variance: "fixed_small", "fixed_large", "learned" or "learned_range"; the learned ones need
            [N, 2C, …] of the model, and "simple" takes no notice of their half.
        objective: "simple" the mean of (target − m)²; "vlb" T · L_t in bits/dim, an estimate of the
            bound less its prior; "hybrid" simple + ``vlb_weight`` · T · L_t, with the mean detached
            in the latter, for learned variances. x̂₀ is not clipped in L_t.
        weighting: of "simple", by timestep; each stated for one regression and converted to what
            the model predicts: "min_snr" min(snr, γ) of x_0's (Hang et al. 2023), "p2"
            (k + snr)^−γ of ε's (Choi et al. 2022).
        min_snr_gamma, p2_gamma, p2_k: the γ and k of these.
        vlb_weight: λ of "hybrid", per bit.
        timestep_sampling: "uniform"; "antithetic", each group of consecutive ids spread evenly over
            the timesteps (Kingma et al. 2021); "loss_second_moment", by importance (Nichol &
            Dhariwal 2021, section 3.3), for which the processes of torch.distributed exchange
            their losses.
        group_size: the number of samples a step takes over all processes; the call's N times the
            processes if None. Of "antithetic", ids g · group_size … are spread together: a batch of
            another size shifts those after it. On a GPU, the exchange of several processes has to
            wait for the device if None.
        offset_noise: s of ε + s·o, o one normal a sample and channel (stream 5). Takes two passes
            more over the batch. "simple" only.
        label_dropout: the share of ``label_key``'s labels that become ``null_label`` (stream 7),
            for classifier-free guidance.
        null_label: the class that stands for none.
        label_key: which of ``model_kwargs`` has the labels.
        dtype: of the x_t that the model gets: x0's if None, float32 for pixels.

    Attributes:
        samples_seen: how many samples were consumed: the first id of the next call.

    Raises:
        TypeError, ValueError: an unknown name, a number out of range, choices that do not go
            together.

    >>> loss = DenoisingLoss(NoiseSchedule.linear())
    >>> loss(lambda x, t: torch.zeros_like(x), torch.zeros(4, 1, 8, 8), seed=0).per_sample.shape
    torch.Size([4])
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        *,
        prediction: Prediction = "epsilon",
        variance: Variance = "fixed_small",
        objective: Objective = "simple",
        weighting: Weighting | None = None,
        min_snr_gamma: float = 5.0,
        p2_gamma: float = 1.0,
        p2_k: float = 1.0,
        vlb_weight: float = 0.001,
        timestep_sampling: TimestepSampling = "uniform",
        group_size: int | None = None,
        offset_noise: float = 0.0,
        label_dropout: float = 0.0,
        null_label: int | None = None,
        label_key: str = "class_labels",
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(schedule, NoiseSchedule):
            raise TypeError(f"schedule must be a NoiseSchedule; got {type(schedule).__name__}")
        one_of("prediction", prediction, Prediction)
        one_of("variance", variance, Variance)
        one_of("objective", objective, Objective)
        one_of("timestep_sampling", timestep_sampling, TimestepSampling)
        learned = variance in ("learned", "learned_range")
        if objective == "hybrid" and not learned:
            raise ValueError(
                "objective='hybrid' trains a variance 'learned' or 'learned_range'; got "
                f"variance={variance!r}"
            )
        if objective != "simple":  # a schedule that has no bound is no use
            vlb_rows(schedule, prediction, variance, torch.device("cpu"))
        if weighting is not None:
            one_of("weighting", weighting, Weighting)
            if objective == "vlb":
                raise ValueError(
                    f"objective='vlb' has the bound's own weights; got weighting={weighting!r}"
                )
        _number("offset_noise", offset_noise)
        if offset_noise and objective != "simple":
            raise ValueError(
                f"offset_noise belongs to objective='simple'; got {offset_noise} with {objective!r}"
            )
        _number("label_dropout", label_dropout, most=1.0)
        if label_dropout and null_label is None:
            raise ValueError("label_dropout needs null_label, the class that stands for none")
        if group_size is not None and not 1 <= integer("group_size", group_size) < 1 << 31:
            raise ValueError(f"group_size must lie in 1 … 2^31 - 1; got {group_size}")
        if dtype is not None and dtype not in FLOAT_DTYPES:
            raise TypeError(f"dtype must be float32, bfloat16, float16 or None; got {dtype}")

        self.schedule = schedule
        self.prediction: Prediction = prediction
        self.variance: Variance = variance
        self.objective: Objective = objective
        self.timestep_sampling: TimestepSampling = timestep_sampling
        self.group_size = group_size
        self.offset_noise = float(offset_noise)
        self.label_dropout = float(label_dropout)
        self.null_label = None if null_label is None else integer("null_label", null_label)
        self.label_key = label_key
        self.dtype = dtype
        self.samples_seen = 0
        self._learned = learned
        weights: Tensor | float = float(len(schedule)) if objective == "vlb" else 1.0
        if weighting == "min_snr":
            gamma = _number("min_snr_gamma", min_snr_gamma, positive=True)
            weights = reference.min_snr_weights(schedule, prediction, gamma)
        elif weighting == "p2":
            gamma, k = _number("p2_gamma", p2_gamma, positive=True), _number("p2_k", p2_k)
            weights = reference.p2_weights(schedule, prediction, gamma, k)
        self._weights = TimestepWeights(weights)
        self._vlb_weights = TimestepWeights(_number("vlb_weight", vlb_weight) * len(schedule))
        self._history = (
            LossSecondMoment(len(schedule)) if timestep_sampling == "loss_second_moment" else None
        )
        self._consecutive = ConsecutiveIds(self._draw)

    def __call__(
        self,
        model: Model,
        x0: Tensor,
        *,
        seed: int | Tensor,
        sample_ids: Tensor | Sequence[int] | None = None,
        t: int | Tensor | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> LossOutput:
        """The loss of a batch.

        Args:
            model: called once, as ``model(x_t, t, **model_kwargs)``; returns a tensor, or an object
                whose ``.sample`` is one.
            x0: [N, C, …] in [-1, 1], float32, bfloat16 or float16; or uint8 pixels.
            seed: of the run, in [0, 2^64); or int64 [N].
            sample_ids: N non-negative integers; if None, those from ``samples_seen`` on, which then
                grows by N. The processes of torch.distributed take N each, one after the other, and
                it grows by all. With ids of your own it is yours to set. A ``range`` costs least.
            t: int64 [N] in 0 … T−1, or one int, instead of drawn ones. Those take no part in the
                history of losses.
            model_kwargs: passed to the model.

        Returns:
            LossOutput, differentiable in the model's parameters.

        Raises:
            TypeError, ValueError: an argument, or what the model returns, of another type, shape or
                range.
        """
        if not callable(model):
            raise TypeError(f"model must be callable; got {type(model).__name__}")
        if not isinstance(x0, Tensor):
            raise TypeError(f"x0 must be a tensor; got {type(x0).__name__}")
        if x0.ndim < 2 or x0.shape[0] == 0:
            raise ValueError(f"x0 must be [N, C, …] with N at least 1; got {list(x0.shape)}")
        if x0.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "x0 requires grad, but the loss is not differentiable in it: detach it"
            )
        samples, device = x0.shape[0], x0.device
        seed, ids, drawn, dropped = self._drawn(seed, sample_ids, samples, device)
        importance = None
        into_history = self._history is not None and t is None and torch.is_grad_enabled()
        if t is not None:
            t = self._given_timesteps(t, samples, device)
        elif self._history is not None:
            t, importance = self._history.to(device).draw(drawn)
        else:
            t = drawn
        kwargs = dict(model_kwargs or {})
        if dropped is not None:
            labels = self._labels(kwargs, samples, device)
            kwargs[self.label_key] = labels.masked_fill(dropped, self.null_label)  # type: ignore[arg-type]

        x_t, offset = self._noised(x0, t, seed, ids)
        asked = t.clone()  # the model may change its own
        output = call_model(model, x_t, asked, kwargs, 2 if self._learned else 1)
        # A power of two: it leaves a sample's value the same in every batch, and where it is the
        # batch's size, the gradient that the op keeps needs no other factor.
        scale = 2.0 ** (samples - 1).bit_length()
        weighted = self._measured(output, x0, t, seed, ids, offset, scale)  # per_sample / scale
        per_sample = weighted * scale
        if importance is not None:
            weighted = weighted * importance
        loss = weighted.sum()
        if scale != samples:
            loss = loss * (scale / samples)
        if into_history:
            self._history.update(t, per_sample, self.group_size)  # type: ignore[union-attr]
        if sample_ids is None:
            self.samples_seen += samples * processes()[1]
        return LossOutput(loss, per_sample, t.clone() if t is drawn else t)  # drawn is a view

    def state_dict(self) -> dict[str, Tensor]:
        """What a run goes on from: ``samples_seen`` int64 0-d, and with "loss_second_moment"
        ``loss_history`` float64 [T, 10] and ``loss_counts`` int64 [T]."""
        state = {"samples_seen": torch.tensor(self.samples_seen)}
        if self._history is not None:
            state["loss_history"] = self._history.history[:-1].clone()
            state["loss_counts"] = self._history.counts[:-1].clone()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from what :meth:`state_dict` gave.

        Raises:
            ValueError: tensors that are missing, not known, or of another shape, as those of
                another ``timestep_sampling`` or schedule are; then nothing has changed.
        """
        own = self.state_dict()
        if set(state) != set(own):
            raise ValueError(
                f"state must have {', '.join(own)}, as timestep_sampling="
                f"{self.timestep_sampling!r} has; got {', '.join(state) or 'nothing'}"
            )
        for name, tensor in own.items():
            found = state[name]
            if not isinstance(found, Tensor) or found.shape != tensor.shape:
                shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise ValueError(
                    f"state's {name} must have shape {list(tensor.shape)}, for a schedule of "
                    f"{len(self.schedule)} steps; got {shape}"
                )
        seen = int(state["samples_seen"])
        if seen < 0:
            raise ValueError(f"state's samples_seen must not be negative; got {seen}")
        self.samples_seen = seen
        if self._history is not None:
            self._history.history[:-1] = state["loss_history"]
            self._history.counts[:-1] = state["loss_counts"]

    def _drawn(
        self,
        seed: int | Tensor,
        sample_ids: Tensor | Sequence[int] | None,
        samples: int,
        device: torch.device,
    ) -> tuple[int | Tensor, Tensor, Tensor, Tensor | None]:
        """The seed and ids as the ops take them, and what is drawn for these: see ``_draw``."""
        rank, count = processes()
        group = self.group_size or samples * count
        if sample_ids is None:
            first = self.samples_seen + rank * samples
            sample_ids = range(first, first + samples)
        if (
            isinstance(sample_ids, range)
            and sample_ids.step == 1
            and len(sample_ids) == samples
            and 0 <= sample_ids.start < sample_ids.stop <= 1 << 63
            and not isinstance(seed, Tensor)
        ):
            key, _, _ = noise_address(seed, None, samples, device)
            found = self._consecutive(key, sample_ids.start, samples, group, device)
            return (seed, *found)  # type: ignore[return-value]
        key, seeds, ids = noise_address(seed, sample_ids, samples, device)
        seeds, ids = reference_address(key, seeds, ids, samples, device)
        return (seeds, ids, *self._draw(seeds, ids, group))

    def _draw(self, seeds: Tensor, ids: Tensor, group_size: int) -> tuple[Tensor, Tensor | None]:
        """Timesteps, or the words that they will be made of; and whose labels are dropped."""
        num_steps = len(self.schedule)
        if self.timestep_sampling == "antithetic":
            t = reference.antithetic_timesteps(num_steps, group_size, seeds, ids)
        elif self.timestep_sampling == "uniform":
            t = reference.random_timesteps(num_steps, seeds, ids)
        else:
            t = reference.first_words(reference.TIMESTEP_STREAM, seeds, ids)
        if not self.label_dropout:
            return t, None
        words = reference.first_words(LABEL_DROP_STREAM, seeds, ids)
        return t, words < math.ceil(self.label_dropout * 2**32)

    def _given_timesteps(self, t: int | Tensor, samples: int, device: torch.device) -> Tensor:
        last = len(self.schedule) - 1
        if not isinstance(t, Tensor):
            return torch.full((samples,), as_int("t", t, last + 1), device=device)
        per_sample_int("t", t, samples, device)
        t = t.contiguous()
        check_range_on_host("t", t, last + 1)
        return t if device.type == "cpu" else t.clamp(0, last)  # it will index tables

    def _labels(self, kwargs: dict[str, Any], samples: int, device: torch.device) -> Tensor:
        labels = kwargs.get(self.label_key)
        if not isinstance(labels, Tensor) or labels.is_floating_point():
            found = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
            raise TypeError(
                f"label_dropout needs model_kwargs[{self.label_key!r}], integers [N]; got {found}"
            )
        if labels.shape != (samples,) or labels.device != device:
            raise ValueError(
                f"model_kwargs[{self.label_key!r}] must have shape [{samples}], on {device}; got "
                f"{list(labels.shape)} on {labels.device}"
            )
        return labels

    def _noised(
        self, x0: Tensor, t: Tensor, seed: int | Tensor, ids: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """x_t, and offset noise's share of the target where it has one."""
        address: dict[str, Any] = {"seed": seed, "sample_ids": ids}
        if not self.offset_noise:
            return add_noise(x0, t, self.schedule, dtype=self.dtype, **address), None
        x_t = add_noise(x0, t, self.schedule, dtype=torch.float32, **address)
        offset = randn(x0.shape[:2], stream=OFFSET_STREAM, device=x0.device, **address)
        offset = self.offset_noise * offset.reshape(*offset.shape, *[1] * (x0.ndim - 2))
        signal, sigma = self.schedule.forward_weights(x0.device).unbind(1)
        x_t += reference.at(sigma, t, offset) * offset
        dtype = self.dtype or (x0.dtype if x0.is_floating_point() else torch.float32)
        share = None if self.prediction == "sample" else offset
        if self.prediction == "v_prediction":
            share = reference.at(signal, t, offset) * offset
        return x_t.to(dtype), share

    def _measured(
        self,
        output: Tensor,
        x0: Tensor,
        t: Tensor,
        seed: int | Tensor,
        ids: Tensor,
        offset: Tensor | None,
        scale: float,
    ) -> Tensor:
        """What the objective makes of each sample, over ``scale``: float32 [N]."""
        arguments: dict[str, Any] = {
            "prediction": self.prediction,
            "variance": self.variance,
            "seed": seed,
            "sample_ids": ids,
        }
        weights = self._weights.of(t, scale)
        if self.objective == "vlb":
            terms = vlb_terms(output, x0, t, self.schedule, weights=weights, **arguments)
            assert isinstance(terms, Tensor)
            return terms
        if self.objective == "hybrid":
            arguments["vlb_weights"] = self._vlb_weights.of(t, scale)
            return hybrid_loss(output, x0, t, self.schedule, simple_weights=weights, **arguments)
        if offset is not None:
            output = output[:, : x0.shape[1]] - offset
            arguments["variance"] = "fixed_small"  # the other half of channels is gone
        data = None if self.prediction == "epsilon" else x0
        return denoising_loss(output, t, self.schedule, x0=data, weights=weights, **arguments)


def processes() -> tuple[int, int]:
    """This process's rank among those of torch.distributed, and their number."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def _number(name: str, value: float, positive: bool = False, most: float = math.inf) -> float:
    """A finite number of at least 0, or above it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number; got {value!r}")
    if not math.isfinite(value) or value < 0 or (positive and value == 0) or value > most:
        limit = "" if most == math.inf else f", at most {most:g}"
        lowest = "above 0" if positive else "at least 0"
        raise ValueError(f"{name} must be finite and {lowest}{limit}; got {value}")
    return float(value)
