"""OpenAI's forward process, training losses and bits/dim, by fused kernels around the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...likelihood import STREAM as LIKELIHOOD_STREAM
from ...ops import add_noise, denoising_loss, randn, vlb_terms
from ...ops.add_noise import STREAM
from ...ops.checks import FLOAT_DTYPES
from ...ops.vlb_terms import hybrid_terms
from .calls import AcceleratedDiffusion
from .tables import Tables

_STAY = "losses and bits/dim stay the stock formulas"


class FastLosses(AcceleratedDiffusion):
    """In the place of GaussianDiffusion's methods of the same names, which take the same
    arguments: what their docstrings say holds here."""

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t = √ᾱ x_0 + √(1−ᾱ) ε (Ho et al. 2020, eq. 4); ε is the next of training's."""
        address, noise = self._training_noise(x_start, noise)
        tables = self._tables
        if isinstance(t, Tensor) and t.numel() == 1:
            t = t.reshape(1).expand(len(x_start))
        of_each = not isinstance(t, Tensor) or t.shape == x_start.shape[:1]
        if not (of_each and tables.is_of_betas and _served(x_start, noise)):
            stock: Any = super()
            return stock.q_sample(x_start, t, noise=_drawn(x_start, address, noise))
        return _noised(tables, x_start, t, address, noise)

    def training_losses(
        self, model: Any, x_start: Tensor, t: Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """The loss of each sample and its parts, [N] each: "loss", and "mse" and "vb" where the
        loss has them. Differentiable in the model's output, once."""
        stock: Any = super()
        choices = self._choices("training_losses", args, kwargs)
        tables = self._tables
        address, noise = self._training_noise(x_start, choices.noise)
        of_bound = tables.loss in ("KL", "RESCALED_KL") or tables.halves == 2
        of_bound = of_bound or tables.prediction is None or not tables.is_of_betas
        why = tables.no_bound if of_bound else None
        if why is not None:
            self._warn(f"{_STAY}: {why}")
        if self._has_own("training_losses") or why is not None or not _served(x_start, noise):
            noise = _drawn(x_start, address, noise)
            return stock.training_losses(
                model, x_start, t, model_kwargs=choices.model_kwargs, noise=noise
            )
        x_t = _noised(tables, x_start, t, address, noise)
        output = self._model_output(tables, self._wrap_model(model), x_t, t, choices.kwargs)
        if output.dtype not in FLOAT_DTYPES:
            noise = _drawn(x_start, address, noise)
            return stock.training_losses(lambda *_, **__: output, x_start, t, noise=noise)
        return self._losses(tables, output, x_start, t.long(), {**address, "noise": noise})

    def calc_bpd_loop(
        self, model: Any, x_start: Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """The bound in bits/dim: "total_bpd" and "prior_bpd" [N], and by descending timestep "vb",
        "xstart_mse" and "mse" [N, T]."""
        stock: Any = self
        choices, tables = self._choices("calc_bpd_loop", args, kwargs), self._tables
        if tables.no_bound is not None:
            self._warn(f"{_STAY}: {tables.no_bound}")
        by_kernels = not self._has_own("calc_bpd_loop")
        by_kernels = by_kernels and tables.no_bound is None and _served(x_start, None)
        seed, ids = self._address(len(x_start), x_start.device)
        address: dict[str, Any] = {"seed": seed, "sample_ids": ids, "stream": LIKELIHOOD_STREAM}
        wrapped = self._wrap_model(model)
        terms = []
        with torch.no_grad():
            for i in reversed(range(self.num_timesteps)):
                t = torch.full((len(x_start),), i, dtype=torch.int64, device=x_start.device)
                address["index"] = i
                noise = None if self.noise_source.is_addressed else torch.randn_like(x_start)
                if by_kernels:
                    x_t = _noised(tables, x_start, i, address, noise)
                    output = self._model_output(tables, wrapped, x_t, t, choices.kwargs)
                if by_kernels and output.dtype in FLOAT_DTYPES:
                    of = {**address, "noise": noise}
                    terms.append(_bound(tables, output, x_start, i, of, choices.clip))
                else:
                    noise = _drawn(x_start, address, noise)
                    terms.append(self._stock_bound(wrapped, x_start, t, noise, choices))
            vb, xstart_mse, mse = (torch.stack(columns, 1) for columns in zip(*terms, strict=True))
            prior = stock._prior_bpd(x_start)
        return {
            "total_bpd": vb.sum(1) + prior,
            "prior_bpd": prior,
            "vb": vb,
            "xstart_mse": xstart_mse,
            "mse": mse,
        }

    def _training_noise(
        self, x_start: Tensor, noise: Tensor | None
    ) -> tuple[dict[str, Any], Tensor | None]:
        """Where the next samples' ε lies, or ε itself."""
        address: dict[str, Any] = {"seed": 0, "stream": STREAM}
        if noise is not None:
            return address, noise
        if not self.noise_source.is_addressed:
            return address, torch.randn_like(x_start)
        seed, ids = self.noise_source.of_training(len(x_start), x_start.device)
        return {**address, "seed": seed, "sample_ids": ids}, None

    def _losses(
        self, tables: Tables, output: Tensor, x_start: Tensor, t: Tensor, of: dict[str, Any]
    ) -> dict[str, Tensor]:
        samples, steps = len(x_start), self.num_timesteps
        assert tables.prediction is not None
        model: dict[str, Any] = {"prediction": tables.prediction, "variance": tables.variance, **of}

        def weights(scale: float) -> Tensor | None:
            return None if scale == 1 else torch.full((samples,), scale, device=output.device)

        if tables.loss in ("KL", "RESCALED_KL"):
            scale = float(steps) if tables.loss == "RESCALED_KL" else 1.0
            arguments = {**model, "cdf": "tanh", "weights": weights(scale)}
            loss: Any = vlb_terms(output, x_start, t, tables.schedule, **arguments)
            return {"loss": loss}
        if tables.halves == 1:
            mse = denoising_loss(output, t, tables.schedule, x0=x_start, **model)
            return {"mse": mse, "loss": mse}
        scale = steps / 1000 if tables.loss == "RESCALED_MSE" else 1.0
        arguments = {**model, "cdf": "tanh", "vlb_weights": weights(scale)}
        loss, mse, vb = hybrid_terms(output, x_start, t, tables.schedule, **arguments)
        return {"vb": vb, "mse": mse, "loss": loss}

    def _stock_bound(
        self, wrapped: Any, x_start: Tensor, t: Tensor, noise: Tensor, choices: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        stock: Any = self  # with what has been set on the object
        x_t = stock.q_sample(x_start, t, noise=noise)
        out = stock._vb_terms_bpd(
            wrapped, x_start, x_t, t, choices.clip_denoised, choices.model_kwargs
        )
        eps = stock._predict_eps_from_xstart(x_t, t, out["pred_xstart"])
        squared_error = ((out["pred_xstart"] - x_start) ** 2).flatten(1).mean(1)
        return out["output"], squared_error, ((eps - noise) ** 2).flatten(1).mean(1)


def _noised(
    tables: Tables,
    x_start: Tensor,
    t: int | Tensor,
    address: dict[str, Any],
    noise: Tensor | None,
) -> Tensor:
    t = t if isinstance(t, int) else t.long()
    return add_noise(x_start, t, tables.schedule, noise=noise, dtype=torch.float32, **address)


def _bound(
    tables: Tables,
    output: Tensor,
    x_start: Tensor,
    t: int,
    of: dict[str, Any],
    clip: tuple[float, float] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each sample's term of the bound, error of x̂₀ and error of the ε that follows from it."""
    assert tables.prediction is not None
    result = vlb_terms(
        output,
        x_start,
        t,
        tables.schedule,
        prediction=tables.prediction,
        variance=tables.variance,
        clip=clip,
        cdf="tanh",
        return_mse=True,
        **of,
    )
    term, squared_error = result
    return term, squared_error, squared_error * float(tables.schedule.snr[t])


def _served(x_start: Tensor, noise: Tensor | None) -> bool:
    """Whether the kernels take such tensors: no float64, no gradients but the model's, and no
    transform of torch.func at work."""
    tensors = [x_start] if noise is None else [x_start, noise]
    return not torch._C._are_functorch_transforms_active() and all(
        tensor.dtype in FLOAT_DTYPES and not (tensor.requires_grad and torch.is_grad_enabled())
        for tensor in tensors
    )


def _drawn(x_start: Tensor, address: dict[str, Any], noise: Tensor | None) -> Tensor:
    """ε for a stock formula."""
    if noise is not None:
        return noise
    return randn(x_start.shape, device=x_start.device, **address).to(x_start.dtype)
