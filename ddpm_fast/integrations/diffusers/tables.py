"""The steps of diffusers' DDPMScheduler and DDIMScheduler as rows of numbers, one a timestep.

Their formulas, computed from their tables in their tables' dtype: where those lose digits or do
something odd, so do these. Nothing here imports diffusers, and nothing reads a value back from a
device.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...ops.reverse_step import NO_CLIP
from ...ops.reverse_step_run import VARIANCES
from ...schedule import ModelVariance

PREDICTIONS = ("epsilon", "sample", "v_prediction")
_LEARNED = ("learned", "learned_range")
_UNLISTED = -2  # the previous timestep of one that the scheduler's list does not hold


@dataclass(eq=False)
class Rows:
    """What reverse_step takes at every timestep; the row of timestep t is len − 1 − t.

    Attributes:
        exact: float64 [T, 9], the columns of StepTable, on the device of the scheduler's tables.
    """

    exact: Tensor
    _single: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _double: dict[torch.device, Tensor] = field(default_factory=dict)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The rows in float32 and their timesteps, as the kernels take them."""
        found = self._single.get(device)
        if found is None:
            with torch.inference_mode(False):
                rows = self.exact.to(device, torch.float32)
                timesteps = torch.arange(len(rows) - 1, -1, -1, device=device)
            found = self._single[device] = rows, timesteps
        return found

    def at(self, row: int, steps: Tensor | None, like: Tensor, dtype: torch.dtype) -> list[Any]:
        """The nine numbers of a step, or nine tensors that meet ``like``'s dimensions."""
        if steps is None and self.exact.is_cpu:
            numbers: list[Any] = self.exact[row].tolist()
            return numbers
        exact = self._double.get(like.device)
        if exact is None:
            with torch.inference_mode(False):
                exact = self._double.setdefault(like.device, self.exact.to(like.device))
        found = exact[row : row + 1] if steps is None else exact[steps.reshape(-1)]
        shape = [-1, *[1] * (like.ndim - 1)]
        return [column.reshape(shape).to(dtype) for column in found.unbind(1)]


@dataclass(eq=False)
class Plan:
    """What a scheduler's steps come to, for as long as nothing that it was made from changes.

    Attributes:
        last: one past the greatest timestep.
        steps: the rows by (eta, whether ε is rederived from the clipped x̂₀); DDPM has neither.
        same, doubled: the kernel's code for a model output of C and of 2C channels; None where that
            many do not fit.
        takes_root: the model's second half is σ².
        returns_output: x̂₀ is the model's output, and of its dtype.
        clip: bounds of x̂₀.
        thresholds: x̂₀ goes through the scheduler's _threshold_sample in place of the clip.
        problem: why the kernels do not serve this configuration; "" if they do.
        raises: the stock step raises.
        timesteps: those of the list as numbers, where they lie on the host.
        listed: of each timestep whether the list holds it; None: all will do, or nobody knows.
    """

    sources: tuple[Any, ...]
    versions: tuple[int, ...]
    last_name: str
    last: int = 0
    previous: Tensor | None = None
    steps: dict[Any, Rows] = field(default_factory=dict)
    same: int | None = 0
    doubled: int | None = None
    takes_root: bool = False
    returns_output: bool = False
    clip: tuple[float, float] = NO_CLIP
    thresholds: bool = False
    problem: str = ""
    raises: bool = False
    timesteps: list[int] | None = None
    first_address: int = 0
    end_address: int = 0
    listed: bytes | None = None

    def fits(self, scheduler: Any) -> bool:
        """Whether the scheduler still is as it was."""
        now = scheduler.__dict__
        alphas, last, timesteps, config, count, custom, variance = self.sources
        versions = self.versions
        return (
            now["alphas_cumprod"] is alphas
            and alphas._version == versions[0]
            and now[self.last_name] is last
            and last._version == versions[1]
            and now["timesteps"] is timesteps
            and timesteps._version == versions[2]
            and now["_internal_dict"] is config
            and now["num_inference_steps"] == count
            and now.get("custom_timesteps") == custom
            and now.get("variance_type") == variance
        )


@torch.inference_mode(False)
@torch.no_grad()
def plan_of(scheduler: Any, host_alphas: Tensor | None, host_timesteps: Tensor | None) -> Plan:
    """The plan of a scheduler as it is now, DDIM's where it has ``final_alpha_cumprod``.

    Args:
        scheduler: its tables become ordinary tensors where they were made in inference mode, since
            those do not tell of changes.
        host_alphas, host_timesteps: the same as its own, on the host, where its own are not.
    """
    is_ddim = hasattr(scheduler, "final_alpha_cumprod")
    last_name = "final_alpha_cumprod" if is_ddim else "one"
    for name in ("alphas_cumprod", last_name, "timesteps"):
        if getattr(scheduler, name).is_inference():
            setattr(scheduler, name, getattr(scheduler, name).clone())
    config = scheduler.config
    tables = scheduler.alphas_cumprod, getattr(scheduler, last_name), scheduler.timesteps
    plan = Plan(
        sources=(
            *tables,
            scheduler.__dict__["_internal_dict"],
            scheduler.num_inference_steps,
            scheduler.__dict__.get("custom_timesteps"),
            scheduler.__dict__.get("variance_type"),
        ),
        versions=tuple(table._version for table in tables),
        last_name=last_name,
        last=len(scheduler.alphas_cumprod),
        returns_output=config.prediction_type == "sample",
        thresholds=bool(config.thresholding),
    )
    if config.clip_sample and not config.thresholding:
        bound = float(config.clip_sample_range)
        plan.clip = min(-bound, bound), bound  # torch.clamp's own way with a negative bound
    plan.raises = config.prediction_type not in PREDICTIONS or (
        is_ddim and scheduler.num_inference_steps is None
    )
    timesteps = tables[2] if host_timesteps is None else host_timesteps
    if timesteps.is_cpu:
        plan.timesteps = [int(t) for t in timesteps.tolist()]
        if tables[2].dtype == torch.int64 and tables[2].is_contiguous() and tables[2].data_ptr():
            plan.first_address = tables[2].data_ptr()
            plan.end_address = plan.first_address + 8 * len(plan.timesteps)
    alphas = tables[0] if host_alphas is None else host_alphas
    if not timesteps.is_cpu:
        alphas = alphas.to(timesteps.device)
    t = torch.arange(plan.last, device=alphas.device)
    if is_ddim:
        if not plan.raises:
            plan.previous = t - config.num_train_timesteps // scheduler.num_inference_steps
        return plan
    plan.previous = t - 1
    if scheduler.__dict__.get("custom_timesteps") or scheduler.num_inference_steps:
        plan.previous = _next_in(timesteps.to(alphas.device), plan.last)
        if plan.timesteps is not None:
            held = set(plan.timesteps)
            plan.listed = bytes(t in held for t in range(plan.last))
    if not plan.raises:
        _ddpm_variance(plan, config.variance_type, scheduler.variance_type)
    if not plan.raises and not plan.problem:
        plan.steps[None] = _ddpm_rows(plan, alphas, tables[1], config, scheduler.variance_type)
    return plan


def ddim_rows(plan: Plan, eta: float, clipped: bool | None, host_alphas: Any) -> Rows:
    """The rows of a plan for one η and source of ε, made once; ``host_alphas()`` as in plan_of."""
    key = float(eta), bool(clipped)
    found = plan.steps.get(key)
    if found is None:
        with torch.inference_mode(False), torch.no_grad():
            found = plan.steps[key] = _ddim_rows(plan, *key, host_alphas())
    return found


def _next_in(timesteps: Tensor, last: int) -> Tensor:
    """Of each timestep the one after its first place in the list, −1 after the last."""
    count = len(timesteps)
    inside = (timesteps >= 0) & (timesteps < last)
    slots = torch.where(inside, timesteps, last).long()
    places = torch.arange(count, device=timesteps.device)
    first = torch.full((last + 1,), count, device=timesteps.device)
    first = first.scatter_reduce(0, slots, places, "amin")[:last]
    ends = torch.tensor([-1, _UNLISTED], device=timesteps.device)
    after = torch.cat([timesteps[1:].long(), ends[:1] if count else ends[:0], ends[1:]])
    return after[first]


def _before(plan: Plan, alphas: Tensor, final: Tensor) -> Tensor:
    """ᾱ of the previous timestep, ``final`` where there is none."""
    assert plan.previous is not None
    final = final.to(alphas.device)
    return torch.where(plan.previous >= 0, alphas[plan.previous.clamp(min=0)], final)


def _x0_columns(alphas: Tensor, prediction: str) -> tuple[Tensor, Tensor, Tensor]:
    """r, c_x, c_m."""
    signal, noise = alphas**0.5, (1 - alphas) ** 0.5
    one = torch.ones_like(signal)
    if prediction == "epsilon":
        return 1 / signal.double(), one, -noise
    if prediction == "sample":
        return one, torch.zeros_like(one), one
    return one, signal, -noise


def _rows(columns: list[Tensor]) -> Rows:
    """From columns by ascending timestep."""
    return Rows(torch.stack([column.double() for column in columns], 1).flip(0).contiguous())


def _ddpm_variance(plan: Plan, kind: str, use: str) -> None:
    """How the model's channels are read. ``kind``: of the variance, the config's variance_type;
    ``use``: what the step takes it for, the scheduler's."""
    if use in _LEARNED:
        plan.doubled = VARIANCES.index("ignored")
    if kind not in _LEARNED:
        return
    if use not in _LEARNED:
        plan.raises = True
        return
    plan.same = None
    if kind == "learned" and use == "learned":
        plan.takes_root = True
    elif use == "learned_range":
        name: ModelVariance = "learned_range" if kind == "learned_range" else "learned"
        plan.doubled = VARIANCES.index(name)
    else:
        plan.problem = f"its config says variance_type={kind!r}, and its variance_type is {use!r}"


def _ddpm_rows(plan: Plan, alphas: Tensor, one: Tensor, config: Any, use: str) -> Rows:
    """Ho et al. 2020, eqs. 7 and 15, for any two neighbours of the list."""
    assert plan.previous is not None
    before = _before(plan, alphas, one)
    beta, beta_before = 1 - alphas, 1 - before
    alpha_step = alphas / before
    beta_step = 1 - alpha_step
    small = (beta_before / beta * beta_step).clamp(min=1e-20)
    kind = config.variance_type
    variance = small
    if kind == "fixed_small_log":
        variance = (0.5 * small.log()).exp()
    elif kind == "fixed_large":
        variance = beta_step
    elif kind == "fixed_large_log":
        variance = beta_step.log()  # and its root is NaN, there as here
    if kind in _LEARNED:
        sigma = torch.ones_like(small)
    elif use == "fixed_small_log":
        sigma = variance
    else:
        sigma = (0.5 * variance).exp() if use == "learned_range" else variance**0.5
    sigma = sigma.clone()
    sigma[0] = 0
    b_0 = before**0.5 * beta_step / beta
    b_x = alpha_step**0.5 * beta_before / beta
    rows = _rows(
        [
            *_x0_columns(alphas, config.prediction_type),
            b_0,
            b_x,
            torch.zeros_like(b_x),
            sigma,
            small.log(),
            beta_step.log(),
        ]
    )
    # One that lies on a device is not read: it shows by NaN that the list does not hold it.
    rows.exact.masked_fill_((plan.previous == _UNLISTED).flip(0)[:, None], torch.nan)
    return rows


def _ddim_rows(plan: Plan, eta: float, clipped: bool, host_alphas: Tensor | None) -> Rows:
    """Song et al. 2021, eqs. 12 and 16."""
    alphas, final, _, config = plan.sources[:4]
    assert plan.previous is not None
    if host_alphas is not None:
        alphas = host_alphas
    alphas = alphas.to(plan.previous.device)
    before = _before(plan, alphas, final)
    beta, beta_before = 1 - alphas, 1 - before
    sigma = eta * ((beta_before / beta) * (1 - alphas / before)) ** 0.5
    direction = ((1 - before - sigma**2) ** 0.5).double()
    signal, noise = (alphas**0.5).double(), (beta**0.5).double()
    b_0, b_x, b_m = (before**0.5).double(), torch.zeros_like(signal), torch.zeros_like(signal)
    prediction = config.prediction_type
    if clipped:  # ε = (x − √ᾱ x̂₀)/√(1−ᾱ) of the clipped x̂₀
        b_0, b_x = b_0 - direction * signal / noise, direction / noise
    elif prediction == "epsilon":
        b_m = direction
    elif prediction == "sample":
        b_x, b_m = direction / noise, -direction * signal / noise
    else:
        b_x, b_m = direction * noise, direction * signal
    none = torch.zeros_like(signal)
    drawn = sigma if eta > 0 else none
    return _rows([*_x0_columns(alphas, prediction), b_0, b_x, b_m, drawn, none, none])
