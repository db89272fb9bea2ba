"""Tables, inputs and expected results that the tests of reverse_step share."""

from __future__ import annotations

import math

import torch

from ddpm_fast import NoiseSchedule, randn, reference

SCHEDULE = NoiseSchedule.cosine()
PREDICTIONS = ["epsilon", "sample", "v_prediction"]
VARIANCES = ["fixed_small", "fixed_large", "learned", "learned_range"]
SEED = 2**63 + 12345


def table_of(prediction="epsilon", variance="fixed_small", **kwargs):
    return SCHEDULE.step_table(prediction=prediction, variance=variance, **kwargs)


def inputs(shape, dtype, table, model_dtype=None, seed=1):
    """x, a model output, its unconditional one; log-variances of a plausible size."""
    doubled = table.model_variance != "none"
    model_shape = (shape[0], 2 * shape[1], *shape[2:]) if doubled else shape
    outputs = []
    for i in (1, 2):
        m = randn(model_shape, seed=seed + i)
        if table.model_variance == "learned":
            m[:, shape[1] :] = m[:, shape[1] :] - 4
        outputs.append(m.to(model_dtype or dtype))
    return randn(shape, seed=seed).to(dtype), *outputs


def steps_for(n, table):
    return torch.tensor([0, len(table) - 1, len(table) // 2])[:n]


def exactly(x, m, table, steps, z, **kwargs):
    """The formula in float64, from the same float32 rows."""
    names = ("model_output_uncond", "guidance_scale", "x0")
    wide = {k: v.double() if k in names else v for k, v in kwargs.items()}
    return reference.reverse_step(
        x.double(),
        m.double(),
        table.rows.double(),
        steps,
        z.double(),
        variance=table.model_variance,
        **wide,
    )


def eagerly(x, m, table, steps, z, **kwargs):
    """The formula as plain PyTorch writes it, in x's dtype, without fma."""
    rows = [reference.at(table.rows[:, i], steps, x) for i in range(9)]
    v = None
    if table.model_variance != "none":
        m, v = m.chunk(2, 1)
    m = m.to(x.dtype)
    uncond = kwargs.get("model_output_uncond")
    if uncond is not None:
        uncond = uncond.to(x.dtype)[:, : x.shape[1]]
        scale = kwargs["guidance_scale"].to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        m = uncond + scale * (m - uncond)
    x0 = rows[0] * (rows[2] * m + rows[1] * x)
    if kwargs.get("x0") is not None:
        x0 = kwargs["x0"].to(x.dtype)
    x0 = x0.clamp(*kwargs.get("clip", (-math.inf, math.inf)))
    sigma = rows[6]
    if table.model_variance in ("learned", "learned_range"):
        log_var = v.to(x.dtype)
        if table.model_variance == "learned_range":
            fraction = (log_var + 1) / 2
            log_var = fraction * rows[8] + (1 - fraction) * rows[7]
        sigma = sigma * torch.exp(0.5 * log_var)
    return rows[3] * x0 + rows[4] * x + rows[5] * m + sigma * z.to(x.dtype), x0


def noise_for(shape, table, steps):
    return randn(shape, seed=SEED, stream=1, index=table.timesteps[steps])
