"""What a scheduler's steps come to, and for how long that holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...ops.reverse_step import NO_CLIP
from ...ops.reverse_step_run import VARIANCES
from ...schedule import ModelVariance
from . import tables
from .tables import LEARNED, UNLISTED, Array, Rows, plainly

PREDICTIONS = ("epsilon", "sample", "v_prediction")
_METHODS = ("_get_variance", "previous_timestep")  # that the rows stand for
_MOST_PLANS, _MOST_ROWS = 4, 32
_FEW = 10  # rows that take hardly longer to make than one


@dataclass(eq=False)
class Plan:
    """What a scheduler's steps come to, for as long as nothing that it was made from changes.

    Attributes:
        sources, versions: what it was made from, and the versions of its tensors.
        content: the timesteps' dtype and bytes, where they lie on the host.
        last: one past the greatest timestep.
        alphas, final: ᾱ, and that of the state after the last step; of numpy on the host.
        places: of each timestep of the list its first place there; none where the list cannot be
            read.
        is_open: timesteps that the list does not hold will do, or nobody knows what it holds.
        listed, all: rows of the list's timesteps, and of all: the row of t is T − 1 − t. By η and
            whether ε is rederived from the clipped x̂₀; DDPM has neither: None.
        once: such keys as have been asked for once.
        same, doubled: the kernel's code for a model output of C and of 2C channels; None where that
            many do not fit.
        takes_root: the model's second half is σ².
        returns_output: x̂₀ is the model's output, and of its dtype.
        clip: bounds of x̂₀.
        thresholds: x̂₀ goes through the scheduler's _threshold_sample in place of the clip.
        problem: why the kernels do not serve this configuration; "" if they do.
        raises: the stock step raises.
        timesteps: those of the list as numbers, where they lie on the host.
    """

    sources: tuple[Any, ...]
    versions: tuple[int, int, int]
    last_name: str
    content: tuple[torch.dtype, bytes] | None = None
    last: int = 0
    alphas: Array = None
    final: Any = None
    stride: int | None = None
    follows_list: bool = False
    variance_type: str = ""
    on_device: Tensor | None = None
    places: dict[int, int] = field(default_factory=dict)
    is_open: bool = True
    listed: dict[Any, Rows] = field(default_factory=dict)
    all: dict[Any, Rows] = field(default_factory=dict)
    once: dict[Any, None] = field(default_factory=dict)
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

    def fits(self, scheduler: Any) -> bool:
        """Whether the scheduler still is as it was."""
        now = scheduler.__dict__
        timesteps = self.sources[2]
        return (
            now["timesteps"] is timesteps
            and timesteps._version == self.versions[2]
            and self.fits_another_list(now)
        )

    def fits_another_list(self, now: dict[str, Any]) -> bool:
        """Whether all but the list is as it was."""
        alphas, last, _, config, count, custom, variance, get_variance, previous = self.sources
        versions = self.versions
        return (
            now["alphas_cumprod"] is alphas
            and alphas._version == versions[0]
            and now[self.last_name] is last
            and last._version == versions[1]
            and now["_internal_dict"] is config
            and now["num_inference_steps"] == count
            and now.get("custom_timesteps") == custom
            and now.get("variance_type") == variance
            and now.get("_get_variance") is get_variance
            and now.get("previous_timestep") is previous
        )

    def take_list(self, timesteps: Tensor) -> None:
        """Fits from now on a scheduler whose list is this tensor, of the same content."""
        self.sources = *self.sources[:2], timesteps, *self.sources[3:]
        self.versions = *self.versions[:2], timesteps._version
        self.first_address = self.end_address = 0
        if self.timesteps is not None and timesteps.dtype == torch.int64:
            address = timesteps.data_ptr()
            if address and timesteps.is_contiguous():
                self.first_address = address
                self.end_address = address + 8 * len(self.timesteps)

    def index_of(self, t: int) -> int:
        """Of the noise of timestep t; one of its own for a timestep below 0."""
        return t if t >= 0 else self.last - 1 - t

    def rows(self, key: Any, t: int, place: int | None) -> tuple[Rows, int]:
        """Rows that hold those of timestep t, which has this place in the list, and which it is.
        An η that is met for the first time may be one of many: it has a row made for it alone,
        unless the list is short."""
        if not isinstance(self.alphas, np.ndarray):
            return self.all_rows(key), self.last - 1 - t
        kept = self.all if place is None else self.listed
        rows = kept.get(key)
        if rows is None:
            few = place is not None and len(self.places) <= _FEW
            if key is not None and not few and key not in self.once:
                _keep(self.once, key, None)
                return self._make(key, np.array([t])), 0
            if place is None:
                rows = self.all_rows(key)
            else:
                rows = self._make_listed(key)
                _keep(kept, key, rows)
        return rows, self.last - 1 - t if place is None else place

    def all_rows(self, key: Any) -> Rows:
        """Those of all timesteps."""
        rows = self.all.get(key)
        if rows is None:
            if isinstance(self.alphas, np.ndarray):
                rows = self._make(key, np.arange(self.last - 1, -1, -1))
            else:
                device = self.alphas.device
                with plainly():
                    steps = torch.arange(self.last - 1, -1, -1, device=device)
                    rows = self._make(key, steps)
            _keep(self.all, key, rows)
        return rows

    def _make_listed(self, key: Any) -> Rows:
        assert self.timesteps is not None
        t = np.array(self.timesteps, dtype=np.int64)
        if len(self.places) == len(t):
            return self._make(key, t, np.array([*self.timesteps[1:], -1]))
        t[(t < -self.last) | (t >= self.last)] = 0  # those that no step takes
        return self._make(key, t)

    def _make(self, key: Any, t: Array, following: Array = None) -> Rows:
        """The rows of these timesteps. ``following``: those after them in the list, if known."""
        with np.errstate(all="ignore"), plainly():
            previous = following
            if following is None or not self.follows_list:
                previous = self._previous(t)
            alphas_before = tables.before(self.alphas, self.final, previous)
            alphas, config = self.alphas[t], self.sources[3]
            if key is None:
                use = self.variance_type
                columns = tables.ddpm_columns(t, alphas, alphas_before, config, use)
            else:
                columns = tables.ddim_columns(t, alphas, alphas_before, config, *key)
            rows = tables.rows_of(t, self.last, columns)
            if self.follows_list and following is None:
                # One that is not read shows by NaN that the list does not hold it.
                unlisted = torch.as_tensor(previous == UNLISTED)
                rows.exact.masked_fill_(unlisted[:, None], torch.nan)
            return rows

    def _previous(self, t: Array) -> Array:
        """The timesteps after these; −1 or less where there are none."""
        if not self.follows_list:
            return t - self.stride
        if not isinstance(t, np.ndarray):
            assert self.on_device is not None
            return tables.next_in(self.on_device, self.last)[t]
        assert self.timesteps is not None
        after, places = [*self.timesteps[1:], -1], self.places
        return np.array([after[places[s]] if s in places else UNLISTED for s in t.tolist()])


def _keep(kept: dict[Any, Any], key: Any, value: Any) -> None:
    """In place of the oldest, where there are too many."""
    while len(kept) >= _MOST_ROWS:
        del kept[next(iter(kept))]
    kept[key] = value


def plan_of(
    scheduler: Any, host_alphas: Tensor | None, host_timesteps: Tensor | None, earlier: list[Plan]
) -> Plan:
    """The plan of a scheduler as it is now, DDIM's where it has ``final_alpha_cumprod``.

    Args:
        scheduler: its tables become ordinary tensors where they were made in inference mode, since
            those do not tell of changes.
        host_alphas, host_timesteps: the same as its own, on the host, where its own are not.
        earlier: its plans so far, one of which may do; the latest first.
    """
    with plainly():
        now = scheduler.__dict__
        last_name = "final_alpha_cumprod" if "final_alpha_cumprod" in now else "one"
        for name in ("alphas_cumprod", last_name, "timesteps"):
            if now[name].is_inference():
                setattr(scheduler, name, now[name].clone())
        timesteps = now["timesteps"]
        on_host = timesteps if host_timesteps is None else host_timesteps
        content = (on_host.dtype, on_host.numpy().tobytes()) if on_host.is_cpu else None
        for plan in earlier:
            if content is not None and plan.content == content and plan.fits_another_list(now):
                plan.take_list(timesteps)
                return plan
        with torch.no_grad():
            plan = _new_plan(scheduler, last_name, host_alphas, on_host, content)
    plan.take_list(timesteps)
    earlier.insert(0, plan)
    del earlier[_MOST_PLANS:]
    return plan


def _new_plan(
    scheduler: Any,
    last_name: str,
    host_alphas: Tensor | None,
    on_host: Tensor,
    content: tuple[torch.dtype, bytes] | None,
) -> Plan:
    now = scheduler.__dict__
    config, steps = now["_internal_dict"], now["num_inference_steps"]
    sources = now["alphas_cumprod"], now[last_name], now["timesteps"]
    custom, variance = now.get("custom_timesteps"), now.get("variance_type")
    own = now.get("_get_variance"), now.get("previous_timestep")
    is_ddim = last_name == "final_alpha_cumprod"
    prediction = config["prediction_type"]
    plan = Plan(
        sources=(*sources, config, steps, custom, variance, *own),
        versions=(sources[0]._version, sources[1]._version, sources[2]._version),
        last_name=last_name,
        content=content,
        last=len(sources[0]),
        returns_output=prediction == "sample",
        thresholds=bool(config["thresholding"]),
        raises=prediction not in PREDICTIONS or (is_ddim and steps is None),
        problem=_overridden(scheduler),
    )
    if config["clip_sample"] and not plan.thresholds:
        bound = float(config["clip_sample_range"])
        plan.clip = min(-bound, bound), bound  # torch.clamp's own way with a negative bound
    if content is not None:
        plan.timesteps = listed = on_host.long().tolist()
        count = len(listed)
        plan.places = dict(zip(reversed(listed), range(count - 1, -1, -1), strict=True))
        if count and (min(listed) < -plan.last or max(listed) >= plan.last):
            inside = range(-plan.last, plan.last)
            plan.places = {t: place for t, place in plan.places.items() if t in inside}
    if is_ddim:
        plan.stride = config["num_train_timesteps"] // steps if steps else None
    else:
        plan.stride = 1
        plan.follows_list = bool(custom or steps)
        plan.is_open = not plan.follows_list or plan.timesteps is None
        plan.variance_type = variance
        if not plan.raises and not plan.problem:
            _ddpm_variance(plan, config["variance_type"], variance)
    _take_tables(plan, host_alphas)
    return plan


def _take_tables(plan: Plan, host_alphas: Tensor | None) -> None:
    alphas, final, timesteps = plan.sources[:3]
    if host_alphas is not None:
        alphas = host_alphas
    known = alphas.is_cpu and final.is_cpu and plan.timesteps is not None
    if known and alphas.dtype in (torch.float32, torch.float64):
        plan.alphas, plan.final = alphas.detach().numpy(), final.detach().numpy()
        return
    if plan.timesteps is None:
        alphas = alphas.to(timesteps.device)
    plan.places = {t: place for t, place in plan.places.items() if t >= 0}
    plan.alphas, plan.final = alphas, final.to(alphas.device)
    if plan.follows_list:
        if plan.timesteps is not None:
            timesteps = torch.tensor(plan.timesteps)
        plan.on_device = timesteps.to(alphas.device)


def _overridden(scheduler: Any) -> str:
    """Why its rows are not those of the stock formulas."""
    for name in _METHODS:
        stock = getattr(scheduler.stock, name, None)
        if stock is not None and (
            name in scheduler.__dict__ or getattr(type(scheduler), name) is not stock
        ):
            return f"it has a {name} of its own"
    return ""


def _ddpm_variance(plan: Plan, kind: str, use: str) -> None:
    """How the model's channels are read. ``kind``: of the variance, the config's variance_type;
    ``use``: what the step takes it for, the scheduler's."""
    if use in LEARNED:
        plan.doubled = VARIANCES.index("ignored")
    if kind not in LEARNED:
        return
    if use not in LEARNED:
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
