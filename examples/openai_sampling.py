"""Sample, train and measure with guided-diffusion's SpacedDiffusion on the fused kernels.

    git clone https://github.com/openai/guided-diffusion; pip install -e guided-diffusion
    python examples/openai_sampling.py [--steps 25]

The one line that matters is ``ddpm_fast.accelerate(diffusion)``: the object is the same, and so are
the methods that their scripts and their TrainLoop call. With one of their checkpoints:

    from guided_diffusion.script_util import create_model_and_diffusion, ...
    model, diffusion = create_model_and_diffusion(**options)
    model.load_state_dict(torch.load("64x64_diffusion.pt", weights_only=True))
    ddpm_fast.accelerate(diffusion, seed=0)
    diffusion.p_sample_loop(model.eval(), (16, 3, 64, 64))

improved-diffusion's objects, and those of other projects with a copy of that code, are accelerated
in the same way. The model here is one convolution, so that what is timed is the diffusion's own
work.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

import ddpm_fast

try:
    from guided_diffusion import gaussian_diffusion as gd
    from guided_diffusion.respace import SpacedDiffusion, space_timesteps
except ImportError as error:
    raise SystemExit(
        f"guided_diffusion cannot be imported ({error}). No package index has it: git clone "
        "https://github.com/openai/guided-diffusion; pip install -e guided-diffusion"
    ) from None

SHAPE = (16, 3, 32, 32)


def new_diffusion(steps: int) -> SpacedDiffusion:
    """As create_gaussian_diffusion(learn_sigma=True, timestep_respacing=str(steps)) makes it."""
    return SpacedDiffusion(
        use_timesteps=space_timesteps(1000, [steps]),
        betas=np.linspace(1e-4, 0.02, 1000),
        model_mean_type=gd.ModelMeanType.EPSILON,
        model_var_type=gd.ModelVarType.LEARNED_RANGE,
        loss_type=gd.LossType.RESCALED_MSE,
        rescale_timesteps=True,
    )


class Model(torch.nn.Module):
    """ε and the share of log β in the variance, of nothing but neighbouring pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.both = torch.nn.Conv2d(3, 6, 3, padding=1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.both(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=25)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    model = Model()
    stock, diffusion = new_diffusion(steps), ddpm_fast.accelerate(new_diffusion(steps), seed=0)

    images = torch.randint(0, 256, SHAPE) / 127.5 - 1
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(20):
        t = torch.randint(0, steps, SHAPE[:1])
        losses = diffusion.training_losses(model, images, t)
        optimizer.zero_grad()
        losses["loss"].mean().backward()
        optimizer.step()
    print(f"trained to a loss of {losses['loss'].mean():.3f}, {losses['mse'].mean():.3f} of it mse")

    seconds = {}
    for name, each in (("stock", stock), ("accelerated", diffusion)):
        begin = time.perf_counter()
        samples = each.p_sample_loop(model, SHAPE)
        middle = time.perf_counter()
        bits = each.calc_bpd_loop(model, images)["total_bpd"].mean()
        seconds[name] = middle - begin, time.perf_counter() - middle
        print(
            f"{name}: samples {list(samples.shape)} in {seconds[name][0]:.3f} s, "
            f"{bits:.2f} bits/dim in {seconds[name][1]:.3f} s"
        )

    diffusion.set_noise(seed=0, sample_ids=[5])  # one image of the batch, alone
    alone = diffusion.p_sample_loop(model, (1, *SHAPE[1:]))
    print(f"image 5 drawn alone differs by {(alone[0] - samples[5]).abs().max():.1e}")


if __name__ == "__main__":
    main()
