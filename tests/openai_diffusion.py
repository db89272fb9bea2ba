"""Stands in for guided-diffusion's and improved-diffusion's GaussianDiffusion and SpacedDiffusion,
which no package index has: the same names, arguments and results, the same draws in the same order.

``peer("guided")`` and ``peer("improved")`` are this file's, ``peer("guided_diffusion")`` and
``peer("improved_diffusion")`` theirs, where they can be imported. Where ``coefficients`` of an
object here is torch.float64, its tables keep all their digits instead of float32's.
"""

from __future__ import annotations

import enum
import importlib.util
import math
import sys
import types
from types import SimpleNamespace

import numpy as np
import torch

ModelMeanType = enum.Enum("ModelMeanType", "PREVIOUS_X START_X EPSILON")
ModelVarType = enum.Enum("ModelVarType", "LEARNED FIXED_SMALL FIXED_LARGE LEARNED_RANGE")
LossType = enum.Enum("LossType", "MSE RESCALED_MSE KL RESCALED_KL")
LEARNED = (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)


def peer(name):
    """Their two classes, ``space_timesteps`` and the enumerations. ImportError where theirs are not
    installed."""
    if name in ("guided", "improved"):
        classes = {"guided": (GaussianDiffusion, SpacedDiffusion)}.get(
            name, (Improved.GaussianDiffusion, Improved.SpacedDiffusion)
        )
        return SimpleNamespace(
            name=name,
            GaussianDiffusion=classes[0],
            SpacedDiffusion=classes[1],
            space_timesteps=space_timesteps,
            ModelMeanType=ModelMeanType,
            ModelVarType=ModelVarType,
            LossType=LossType,
        )
    diffusion = importlib.import_module(f"{name}.gaussian_diffusion")
    respace = importlib.import_module(f"{name}.respace")
    names = ("GaussianDiffusion", "ModelMeanType", "ModelVarType", "LossType")
    return SimpleNamespace(
        name=name,
        SpacedDiffusion=respace.SpacedDiffusion,
        space_timesteps=respace.space_timesteps,
        **{each: getattr(diffusion, each) for each in names},
    )


def as_package():
    """What sys.modules lacks for ``import guided_diffusion``: this module in its place, or nothing
    where theirs can be imported."""
    if importlib.util.find_spec("guided_diffusion") is not None:
        return {}
    package, here = types.ModuleType("guided_diffusion"), sys.modules[__name__]
    package.gaussian_diffusion = package.respace = here
    names = ("guided_diffusion.gaussian_diffusion", "guided_diffusion.respace")
    return {"guided_diffusion": package, **dict.fromkeys(names, here)}


def over_dimensions(values):
    """Bits of nats, or just the mean, of a sample."""
    return values.flatten(1).mean(1)


def gaussian_kl(mean_q, log_q, mean_p, log_p):
    difference = log_q - log_p
    inside = torch.exp(difference) + (mean_q - mean_p) ** 2 * torch.exp(-log_p)
    return 0.5 * (-1.0 - difference + inside)


def bin_log_probability(pixel, mean, log_std):
    def below(edge):
        z = torch.exp(-log_std) * (pixel - mean + edge)
        return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3)))

    def log(p):
        return p.clamp(min=1e-12).log()

    high, low = below(1.0 / 255.0), below(-1.0 / 255.0)
    inner_or_top = torch.where(pixel > 0.999, log(1.0 - low), log(high - low))
    return torch.where(pixel < -0.999, log(high), inner_or_top)


class GaussianDiffusion:
    coefficients = torch.float32

    def __init__(
        self, *, betas, model_mean_type, model_var_type, loss_type, rescale_timesteps=False
    ):
        self.betas = np.array(betas, dtype=np.float64)
        self.num_timesteps = len(self.betas)
        self.model_mean_type, self.model_var_type = model_mean_type, model_var_type
        self.loss_type, self.rescale_timesteps = loss_type, rescale_timesteps
        bar = np.cumprod(1.0 - self.betas)
        before = np.concatenate([[1.0], bar[:-1]])
        self.alphas_cumprod, self.alphas_cumprod_prev = bar, before
        self.alphas_cumprod_next = np.concatenate([bar[1:], [0.0]])
        self.sqrt_alphas_cumprod = np.sqrt(bar)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - bar)
        self.log_one_minus_alphas_cumprod = np.log(1.0 - bar)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / bar)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / bar - 1)
        self.posterior_variance = self.betas * (1.0 - before) / (1.0 - bar)
        floor = self.posterior_variance.copy()
        floor[0] = floor[1]
        self.posterior_log_variance_clipped = np.log(floor)
        self.posterior_mean_coef1 = self.betas * np.sqrt(before) / (1.0 - bar)
        self.posterior_mean_coef2 = (1.0 - before) * np.sqrt(1.0 - self.betas) / (1.0 - bar)

    def _at(self, values, t, like):
        column = torch.from_numpy(values).to(t.device)[t].to(self.coefficients)
        return column.reshape(-1, *[1] * (like.ndim - 1)).expand(like.shape)

    def _scale_timesteps(self, t):
        return t.float() * (1000.0 / self.num_timesteps) if self.rescale_timesteps else t

    # Forward process

    def q_mean_variance(self, x_start, t):
        mean = self._at(self.sqrt_alphas_cumprod, t, x_start) * x_start
        variance = self._at(1.0 - self.alphas_cumprod, t, x_start)
        return mean, variance, self._at(self.log_one_minus_alphas_cumprod, t, x_start)

    def q_sample(self, x_start, t, noise=None):
        noise = torch.randn_like(x_start) if noise is None else noise
        signal = self._at(self.sqrt_alphas_cumprod, t, x_start)
        return signal * x_start + self._at(self.sqrt_one_minus_alphas_cumprod, t, x_start) * noise

    def q_posterior_mean_variance(self, x_start, x_t, t):
        of_start = self._at(self.posterior_mean_coef1, t, x_t) * x_start
        mean = of_start + self._at(self.posterior_mean_coef2, t, x_t) * x_t
        variance = self._at(self.posterior_variance, t, x_t)
        return mean, variance, self._at(self.posterior_log_variance_clipped, t, x_t)

    # Reverse process

    def _predict_xstart_from_eps(self, x_t, t, eps):
        root = self._at(self.sqrt_recip_alphas_cumprod, t, x_t)
        return root * x_t - self._at(self.sqrt_recipm1_alphas_cumprod, t, x_t) * eps

    def _predict_xstart_from_xprev(self, x_t, t, xprev):
        ratio = self.posterior_mean_coef2 / self.posterior_mean_coef1
        of_prev = self._at(1.0 / self.posterior_mean_coef1, t, x_t) * xprev
        return of_prev - self._at(ratio, t, x_t) * x_t

    def _predict_eps_from_xstart(self, x_t, t, pred_xstart):
        rest = self._at(self.sqrt_recip_alphas_cumprod, t, x_t) * x_t - pred_xstart
        return rest / self._at(self.sqrt_recipm1_alphas_cumprod, t, x_t)

    def _log_variance(self, values, t, x):
        """Of the second half of a model's output, or of none."""
        if self.model_var_type == ModelVarType.LEARNED:
            return values, values.exp()
        if self.model_var_type == ModelVarType.LEARNED_RANGE:
            share = (values + 1) / 2
            lowest = self._at(self.posterior_log_variance_clipped, t, x)
            between = share * self._at(np.log(self.betas), t, x) + (1 - share) * lowest
            return between, between.exp()
        variance, logarithm = self.posterior_variance, self.posterior_log_variance_clipped
        large = np.concatenate([variance[1:2], self.betas[1:]])
        if self.model_var_type == ModelVarType.FIXED_LARGE:
            variance, logarithm = large, np.log(large)
        return self._at(logarithm, t, x), self._at(variance, t, x)

    def p_mean_variance(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        output, values = model(x, self._scale_timesteps(t), **(model_kwargs or {})), None
        if self.model_var_type in LEARNED:
            assert output.shape[1] == 2 * x.shape[1]
            output, values = output.split(x.shape[1], 1)
        log_variance, variance = self._log_variance(values, t, x)
        start = output
        if self.model_mean_type == ModelMeanType.EPSILON:
            start = self._predict_xstart_from_eps(x, t, output)
        elif self.model_mean_type == ModelMeanType.PREVIOUS_X:
            start = self._predict_xstart_from_xprev(x, t, output)
        start = start if denoised_fn is None else denoised_fn(start)
        start = start.clamp(-1, 1) if clip_denoised else start
        mean = output
        if self.model_mean_type != ModelMeanType.PREVIOUS_X:
            mean = self.q_posterior_mean_variance(start, x, t)[0]
        return {
            "mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": start
        }  # fmt: skip

    def condition_mean(self, cond_fn, p_mean_var, x, t, model_kwargs=None):
        slope = cond_fn(x, self._scale_timesteps(t), **model_kwargs)
        return p_mean_var["mean"].float() + p_mean_var["variance"] * slope.float()

    def condition_score(self, cond_fn, p_mean_var, x, t, model_kwargs=None):
        slope = cond_fn(x, self._scale_timesteps(t), **model_kwargs)
        eps = self._predict_eps_from_xstart(x, t, p_mean_var["pred_xstart"])
        eps = eps - (1 - self._at(self.alphas_cumprod, t, x)).sqrt() * slope
        start = self._predict_xstart_from_eps(x, t, eps)
        mean = self.q_posterior_mean_variance(start, x, t)[0]
        return {**p_mean_var, "pred_xstart": start, "mean": mean}

    def p_sample(
        self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None
    ):
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        noise = torch.randn_like(x)
        mean = out["mean"]
        if cond_fn is not None:
            mean = self.condition_mean(cond_fn, out, x, t, model_kwargs=model_kwargs)
        moves = (t != 0).float().reshape(-1, *[1] * (x.ndim - 1))
        sample = mean + moves * torch.exp(0.5 * out["log_variance"]) * noise
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def ddim_sample(
        self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
        eta=0.0,
    ):  # fmt: skip
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        if cond_fn is not None:
            out = self.condition_score(cond_fn, out, x, t, model_kwargs=model_kwargs)
        start = out["pred_xstart"]
        eps = self._predict_eps_from_xstart(x, t, start)
        bar = self._at(self.alphas_cumprod, t, x)
        before = self._at(self.alphas_cumprod_prev, t, x)
        sigma = eta * torch.sqrt((1 - before) / (1 - bar)) * torch.sqrt(1 - bar / before)
        noise = torch.randn_like(x)
        mean = start * torch.sqrt(before) + torch.sqrt(1 - before - sigma**2) * eps
        moves = (t != 0).float().reshape(-1, *[1] * (x.ndim - 1))
        return {"sample": mean + moves * sigma * noise, "pred_xstart": start}

    def ddim_reverse_sample(
        self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None, eta=0.0
    ):
        assert eta == 0.0
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        eps = self._predict_eps_from_xstart(x, t, out["pred_xstart"])
        after = self._at(self.alphas_cumprod_next, t, x)
        sample = out["pred_xstart"] * torch.sqrt(after) + torch.sqrt(1 - after) * eps
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def _walk(self, step, model, shape, noise, device, progress):
        assert isinstance(shape, (tuple, list))
        assert not progress  # tests show no bars
        device = next(model.parameters()).device if device is None else device
        x = torch.randn(*shape, device=device) if noise is None else noise
        for i in reversed(range(self.num_timesteps)):
            t = torch.tensor([i] * shape[0], device=device)
            with torch.no_grad():
                out = step(model, x, t)
            yield out
            x = out["sample"]

    def p_sample_loop_progressive(
        self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None,
        model_kwargs=None, device=None, progress=False,
    ):  # fmt: skip
        def step(model, x, t):
            return self.p_sample(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs)

        yield from self._walk(step, model, shape, noise, device, progress)

    def p_sample_loop(
        self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None,
        model_kwargs=None, device=None, progress=False,
    ):  # fmt: skip
        *_, last = self.p_sample_loop_progressive(
            model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress
        )
        return last["sample"]

    def ddim_sample_loop_progressive(
        self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None,
        model_kwargs=None, device=None, progress=False, eta=0.0,
    ):  # fmt: skip
        def step(model, x, t):
            return self.ddim_sample(
                model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs, eta
            )

        yield from self._walk(step, model, shape, noise, device, progress)

    def ddim_sample_loop(
        self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None,
        model_kwargs=None, device=None, progress=False, eta=0.0,
    ):  # fmt: skip
        *_, last = self.ddim_sample_loop_progressive(
            model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device,
            progress, eta,
        )  # fmt: skip
        return last["sample"]

    # Objective and bound

    def _vb_terms_bpd(self, model, x_start, x_t, t, clip_denoised=True, model_kwargs=None):
        q_mean, _, q_log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        out = self.p_mean_variance(model, x_t, t, clip_denoised, model_kwargs=model_kwargs)
        kl = gaussian_kl(q_mean, q_log_variance, out["mean"], out["log_variance"])
        nll = -bin_log_probability(x_start, out["mean"], 0.5 * out["log_variance"])
        bits = torch.where(t == 0, over_dimensions(nll), over_dimensions(kl)) / math.log(2.0)
        return {"output": bits, "pred_xstart": out["pred_xstart"]}

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise=noise)
        if self.loss_type in (LossType.KL, LossType.RESCALED_KL):
            terms = self._vb_terms_bpd(model, x_start, x_t, t, False, model_kwargs)
            whole = self.num_timesteps if self.loss_type == LossType.RESCALED_KL else 1
            return {"loss": terms["output"] * whole}
        terms = {}
        output = model(x_t, self._scale_timesteps(t), **(model_kwargs or {}))
        if self.model_var_type in LEARNED:
            output, values = output.split(x_t.shape[1], 1)
            held = torch.cat([output.detach(), values], 1)
            vb = self._vb_terms_bpd(lambda *args: held, x_start, x_t, t, False)["output"]
            scale = self.num_timesteps / 1000 if self.loss_type == LossType.RESCALED_MSE else 1
            terms["vb"] = vb * scale
        # Computed for every mean type, as theirs is: benchmarks measure this.
        previous = self.q_posterior_mean_variance(x_start, x_t, t)[0]
        targets = {ModelMeanType.START_X: x_start, ModelMeanType.PREVIOUS_X: previous}
        target = targets.get(self.model_mean_type, noise)
        terms["mse"] = over_dimensions((target - output) ** 2)
        terms["loss"] = terms["mse"] + terms["vb"] if "vb" in terms else terms["mse"]
        return terms

    def _prior_bpd(self, x_start):
        t = torch.tensor([self.num_timesteps - 1] * len(x_start), device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        standard = torch.zeros((), dtype=log_variance.dtype)
        return over_dimensions(gaussian_kl(mean, log_variance, 0.0, standard)) / math.log(2.0)

    def calc_bpd_loop(self, model, x_start, clip_denoised=True, model_kwargs=None):
        columns = {"vb": [], "xstart_mse": [], "mse": []}
        for i in reversed(range(self.num_timesteps)):
            t = torch.tensor([i] * len(x_start), device=x_start.device)
            noise = torch.randn_like(x_start)
            x_t = self.q_sample(x_start, t, noise=noise)
            with torch.no_grad():
                out = self._vb_terms_bpd(model, x_start, x_t, t, clip_denoised, model_kwargs)
            eps = self._predict_eps_from_xstart(x_t, t, out["pred_xstart"])
            columns["vb"].append(out["output"])
            columns["xstart_mse"].append(over_dimensions((out["pred_xstart"] - x_start) ** 2))
            columns["mse"].append(over_dimensions((eps - noise) ** 2))
        found = {name: torch.stack(values, 1) for name, values in columns.items()}
        prior = self._prior_bpd(x_start)
        return {"total_bpd": found["vb"].sum(1) + prior, "prior_bpd": prior, **found}


def space_timesteps(num_timesteps, section_counts):
    """Which timesteps to keep: so many of each of equal sections, or "ddimN"."""
    if isinstance(section_counts, str) and section_counts.startswith("ddim"):
        wanted = int(section_counts.removeprefix("ddim"))
        for stride in range(1, num_timesteps):
            kept = range(0, num_timesteps, stride)
            if len(kept) == wanted:
                return set(kept)
        raise ValueError(f"no stride of {num_timesteps} steps takes {wanted}")
    if isinstance(section_counts, str):
        section_counts = [int(count) for count in section_counts.split(",")]
    smaller, larger = divmod(num_timesteps, len(section_counts))
    kept, begin = set(), 0
    for i, count in enumerate(section_counts):
        size = smaller + (i < larger)
        if count > size:
            raise ValueError(f"a section of {size} steps has no {count}")
        stride = (size - 1) / (count - 1) if count > 1 else 1
        position = 0.0  # added up, as theirs is: halves round by what it comes to
        for _ in range(count):
            kept.add(begin + round(position))
            position += stride
        begin += size
    return kept


class _WrappedModel:
    def __init__(self, model, timestep_map, rescale_timesteps, original_num_steps):
        self.model, self.timestep_map = model, timestep_map
        self.rescale_timesteps = rescale_timesteps
        self.original_num_steps = original_num_steps

    def __call__(self, x, ts, **kwargs):
        kept = torch.tensor(self.timestep_map, device=ts.device, dtype=ts.dtype)[ts]
        if self.rescale_timesteps:
            kept = kept.float() * (1000.0 / self.original_num_steps)
        return self.model(x, kept, **kwargs)


class SpacedDiffusion(GaussianDiffusion):
    """Keeps some of the timesteps, and tells the model the old ones."""

    def __init__(self, use_timesteps, **kwargs):
        bar = np.cumprod(1.0 - np.array(kwargs["betas"], dtype=np.float64))
        self.use_timesteps, self.original_num_steps = set(use_timesteps), len(bar)
        self.timestep_map = [i for i in range(len(bar)) if i in self.use_timesteps]
        kept = bar[self.timestep_map]
        betas = 1 - kept / np.concatenate([[1.0], kept[:-1]])
        super().__init__(**{**kwargs, "betas": betas})

    def p_mean_variance(self, model, *args, **kwargs):
        return super().p_mean_variance(self._wrap_model(model), *args, **kwargs)

    def training_losses(self, model, *args, **kwargs):
        return super().training_losses(self._wrap_model(model), *args, **kwargs)

    def _wrap_model(self, model):
        if isinstance(model, _WrappedModel):
            return model
        return _WrappedModel(
            model, self.timestep_map, self.rescale_timesteps, self.original_num_steps
        )

    def _scale_timesteps(self, t):
        return t

    def condition_mean(self, cond_fn, *args, **kwargs):
        return super().condition_mean(self._wrap_model(cond_fn), *args, **kwargs)

    def condition_score(self, cond_fn, *args, **kwargs):
        return super().condition_score(self._wrap_model(cond_fn), *args, **kwargs)


class Improved:
    """improved-diffusion's, which has no cond_fn: not even as a place among the arguments."""

    class GaussianDiffusion(GaussianDiffusion):
        def p_sample(
            self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None
        ):  # fmt: skip
            return super().p_sample(model, x, t, clip_denoised, denoised_fn, None, model_kwargs)

        def ddim_sample(
            self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None, eta=0.0
        ):
            return super().ddim_sample(
                model, x, t, clip_denoised, denoised_fn, None, model_kwargs, eta
            )

        def p_sample_loop(
            self, model, shape, noise=None, clip_denoised=True, denoised_fn=None,
            model_kwargs=None, device=None, progress=False,
        ):  # fmt: skip
            *_, last = self.p_sample_loop_progressive(
                model, shape, noise, clip_denoised, denoised_fn, model_kwargs, device, progress
            )
            return last["sample"]

        def p_sample_loop_progressive(
            self, model, shape, noise=None, clip_denoised=True, denoised_fn=None,
            model_kwargs=None, device=None, progress=False,
        ):  # fmt: skip
            def step(model, x, t):
                return self.p_sample(model, x, t, clip_denoised, denoised_fn, model_kwargs)

            yield from self._walk(step, model, shape, noise, device, progress)

        def ddim_sample_loop(
            self, model, shape, noise=None, clip_denoised=True, denoised_fn=None,
            model_kwargs=None, device=None, progress=False, eta=0.0,
        ):  # fmt: skip
            *_, last = self.ddim_sample_loop_progressive(
                model, shape, noise, clip_denoised, denoised_fn, model_kwargs, device, progress, eta
            )
            return last["sample"]

        def ddim_sample_loop_progressive(
            self, model, shape, noise=None, clip_denoised=True, denoised_fn=None,
            model_kwargs=None, device=None, progress=False, eta=0.0,
        ):  # fmt: skip
            def step(model, x, t):
                return self.ddim_sample(model, x, t, clip_denoised, denoised_fn, model_kwargs, eta)

            yield from self._walk(step, model, shape, noise, device, progress)

    class SpacedDiffusion(SpacedDiffusion, GaussianDiffusion):
        pass
