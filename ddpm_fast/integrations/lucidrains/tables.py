"""lucidrains' GaussianDiffusion as the kernels take it: tables made of its own buffers.

DDPM is eqs. 6 and 7 of Ho et al. 2020, DDIM eq. 12 of Song et al. 2021 with ε rederived from the
clipped x̂₀, both by that class's formulas and in its buffers' dtype, so that roundings agree.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...schedule import Prediction
from ..forward import ForwardWeights
from ..steps import Steps

PREDICTIONS: dict[str, Prediction] = {
    "pred_noise": "epsilon",
    "pred_x0": "sample",
    "pred_v": "v_prediction",
}
BUFFERS = (
    "betas",
    "alphas_cumprod",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)
_FORWARD = ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")
_KEPT = 16  # tables of one diffusion

Buffers = Mapping[str, Any]
_Table = TypeVar("_Table")


class Tables:
    """The tables of one diffusion, made when they are first asked for and anew when its buffers
    are others or were written to. A copy or a pickle of it is empty.

    Writes through ``.data``, as ema_pytorch's, count no version: ``look`` finds them by the values,
    where these lie on the CPU, and drops the tables.

    Replicas of one object on several devices share it, so each device has tables of its own.
    """

    def __init__(self) -> None:
        self._made: dict[Any, tuple[list[Tensor], list[int], Any]] = {}
        self._seen: dict[str, Tensor] = {}  # the bytes of buffers on the CPU
        self._warned: set[str] = set()

    def __reduce__(self) -> tuple[type[Tables], tuple[()]]:
        return Tables, ()

    def drop(self) -> None:
        """All of them are made anew."""
        self._made.clear()
        self._seen.clear()

    def look(self, buffers: Buffers) -> None:
        """Drops the tables unless the buffers are those of the last look: 20 µs."""
        if buffers["betas"].device.type != "cpu":
            return
        seen = {name: buffers[name].view(torch.uint8) for name in BUFFERS}
        if self._seen.keys() != seen.keys() or not all(
            torch.equal(seen[name], self._seen[name]) for name in BUFFERS
        ):
            self.drop()
            self._seen = {name: values.clone() for name, values in seen.items()}

    def forward(self, buffers: Buffers) -> ForwardWeights:
        """√ᾱ and √(1−ᾱ) for add_noise and denoising_loss."""

        def make() -> ForwardWeights:
            signal = buffers["sqrt_alphas_cumprod"]
            return ForwardWeights(signal, buffers["sqrt_one_minus_alphas_cumprod"])

        return self._get(buffers, "forward", make, _FORWARD)

    def ddpm(self, buffers: Buffers, objective: str) -> Steps:
        """The posterior's step at each timestep."""
        return self._get(buffers, objective, lambda: _ddpm_steps(buffers, objective))

    def ddim(self, buffers: Buffers, objective: str, times: list[int], eta: float) -> Steps:
        """The steps of a trajectory along ``times`` but for the last, whose result is x̂₀. The rows
        of other timesteps are 0."""
        key = (objective, tuple(times), eta)
        return self._get(buffers, key, lambda: _ddim_steps(buffers, objective, times, eta))

    def _get(
        self,
        buffers: Buffers,
        key: Any,
        make: Callable[[], _Table],
        names: tuple[str, ...] = BUFFERS,
    ) -> _Table:
        now = [buffers[name] for name in names]
        versions = [-1 if buffer.is_inference() else buffer._version for buffer in now]
        place = now[0].device, key
        made = self._made.get(place)
        if (
            made is None
            or made[1] != versions
            or any(old is not new for old, new in zip(made[0], now, strict=True))
        ):
            if len(self._made) >= _KEPT:
                self._made.clear()
            with torch.inference_mode(False):
                made = self._made[place] = now, versions, make()
        table: _Table = made[2]
        return table

    def warn_once(self, reason: str) -> None:
        """Says once for this object why something is left to plain PyTorch."""
        self.say_once(f"ddpm_fast leaves this to plain PyTorch: {reason}", stacklevel=5)

    def say_once(self, message: str, stacklevel: int = 3) -> None:
        """A warning, once for this object."""
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=stacklevel)


def ddim_times(num_timesteps: int, num_steps: int) -> list[int]:
    """The timesteps at which a DDIM trajectory calls the model, descending, as the stock code
    rounds them (in torch's default dtype)."""
    times: list[int] = torch.linspace(-1, num_timesteps - 1, num_steps + 1).int().tolist()
    return times[:0:-1]


def _to_x0(buffers: Buffers, objective: str) -> dict[str, Any]:
    """r, c_x and c_m of x̂₀ = r (c_m m + c_x x)."""
    one, zero = torch.ones(1), torch.zeros(1)
    c_x, c_m = zero, one
    if objective == "pred_noise":
        c_x, c_m = buffers["sqrt_recip_alphas_cumprod"], -buffers["sqrt_recipm1_alphas_cumprod"]
    elif objective == "pred_v":
        c_x, c_m = buffers["sqrt_alphas_cumprod"], -buffers["sqrt_one_minus_alphas_cumprod"]
    return {"r": one, "c_x": c_x, "c_m": c_m, "prediction": PREDICTIONS[objective]}


def _ddpm_steps(buffers: Buffers, objective: str) -> Steps:
    sigma = (0.5 * buffers["posterior_log_variance_clipped"]).exp()
    sigma[0] = 0  # where no noise is drawn
    return Steps.of(
        b_0=buffers["posterior_mean_coef1"],
        b_x=buffers["posterior_mean_coef2"],
        b_m=torch.zeros(1),
        sigma=sigma,
        **_to_x0(buffers, objective),
    )


def _ddim_steps(buffers: Buffers, objective: str, times: list[int], eta: float) -> Steps:
    alphas_cumprod = buffers["alphas_cumprod"]
    left, into = times[:-1], times[1:]
    alpha, alpha_next = alphas_cumprod[left], alphas_cumprod[into]
    sigma = eta * ((1 - alpha / alpha_next) * (1 - alpha_next) / (1 - alpha)).sqrt()
    of_eps = (1 - alpha_next - sigma**2).sqrt().double()
    # ε = (√(1/ᾱ) x − x̂₀) / √(1/ᾱ − 1), multiplied out where there are digits to spare.
    k = of_eps / buffers["sqrt_recipm1_alphas_cumprod"][left].double()
    columns = {
        "b_0": alpha_next.sqrt().double() - k,
        "b_x": k * buffers["sqrt_recip_alphas_cumprod"][left].double(),
        "sigma": sigma.double(),
    }
    rows: dict[str, Any] = {}
    for name, column in columns.items():
        rows[name] = torch.zeros_like(alphas_cumprod, dtype=torch.float64)
        rows[name][left] = column
    return Steps.of(b_m=torch.zeros(1), method="ddim", **rows, **_to_x0(buffers, objective))
