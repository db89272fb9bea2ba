"""Train denoising-diffusion-pytorch's GaussianDiffusion on the fused kernels, and sample from it.

    pip install denoising-diffusion-pytorch
    python examples/lucidrains_training.py [--steps 100]

The one line that matters is ``ddpm_fast.accelerate(diffusion)``: the object is the same, and so are
its state_dict and the package's own Trainer. To go on from a Trainer's checkpoint:

    saved = torch.load("results/model-10.pt", weights_only=True)
    diffusion.load_state_dict(saved["model"])
    Trainer(ddpm_fast.accelerate(diffusion), "path/to/images", ...).train()

The images here are drawn by the script: discs of one colour on another.
"""

from __future__ import annotations

import argparse
import time

import torch

import ddpm_fast

SIZE = 16


def discs(count: int) -> torch.Tensor:
    """[N, 3, 16, 16] in [0, 1]."""
    centre = torch.rand(count, 2, 1, 1) * 6 + 5
    radius = torch.rand(count, 1, 1) * 3 + 2
    y, x = torch.arange(SIZE)[:, None], torch.arange(SIZE)
    inside = (y - centre[:, 0]) ** 2 + (x - centre[:, 1]) ** 2 < radius**2
    colours = torch.rand(2, count, 3, 1, 1)
    return torch.where(inside[:, None], *colours)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=16)
    arguments = parser.parse_args()
    try:
        from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    except (ImportError, RuntimeError) as error:  # the latter from a torchvision of another torch
        raise SystemExit(
            f"denoising_diffusion_pytorch cannot be imported ({error}). It needs pip install "
            "denoising-diffusion-pytorch, and a torchvision of the same release and index as torch"
        ) from None

    torch.manual_seed(0)
    model = Unet(dim=16, dim_mults=(1, 2), flash_attn=False)
    diffusion = GaussianDiffusion(model, image_size=SIZE, sampling_timesteps=20)
    ddpm_fast.accelerate(diffusion, seed=0)

    optimizer = torch.optim.Adam(diffusion.parameters(), lr=2e-3)
    losses = []
    start = time.perf_counter()
    for _ in range(arguments.steps):
        loss = diffusion(discs(arguments.batch_size))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    tenth = max(1, len(losses) // 10)
    first, last = (sum(part) / tenth for part in (losses[:tenth], losses[-tenth:]))
    seconds = time.perf_counter() - start
    print(f"{len(losses)} steps in {seconds:.1f} s; the loss went from {first:.3f} to {last:.3f}")

    diffusion.eval()
    images = diffusion.sample(batch_size=4)
    diffusion.set_noise(seed=0, sample_ids=[2])  # the third of them, by itself
    alone = diffusion.sample(batch_size=1)
    print(
        f"sampled {tuple(images.shape)}; image 2 of seed 0 alone differs by "
        f"{(alone[0] - images[2]).abs().max().item():.1e}"
    )


if __name__ == "__main__":
    main()
