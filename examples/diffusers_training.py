"""A training loop with diffusers' UNet and the fast scheduler's forward process.

What a training script of diffusers does, on images of two colours, so that it runs offline in
seconds: ``FastDDPMScheduler`` in place of ``DDPMScheduler`` is the only change, and what it saves
is a stock scheduler.

Run: python examples/diffusers_training.py [steps]
"""

from __future__ import annotations

import sys

import torch
from diffusers import DDPMPipeline, UNet2DModel

from ddpm_fast.integrations.diffusers import FastDDPMScheduler


def images(count: int) -> torch.Tensor:
    """[count, 3, 8, 8] in [-1, 1]: each of one grey, light or dark."""
    return (torch.randint(0, 2, (count, 1, 1, 1)) * 1.0 - 0.5).expand(count, 3, 8, 8).contiguous()


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 150
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    scheduler = FastDDPMScheduler(num_train_timesteps=200, prediction_type="v_prediction")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    losses = []
    for _ in range(steps):
        x0 = images(32)
        noise = torch.randn_like(x0)
        t = torch.randint(0, len(scheduler), (len(x0),))
        x_t = scheduler.add_noise(x0, noise, t)
        target = scheduler.get_velocity(x0, noise, t)
        loss = torch.nn.functional.mse_loss(unet(x_t, t).sample, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    tenth = max(1, steps // 10)
    first, last = (sum(part) / tenth for part in (losses[:tenth], losses[-tenth:]))
    print(f"{steps} steps, loss {first:.3f} to {last:.3f}")

    pipe = DDPMPipeline(unet=unet.eval(), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(8, num_inference_steps=50, output_type="pt").images
    print("mean grey of 8 images:", " ".join(f"{grey:.2f}" for grey in drawn.mean((1, 2, 3))))
    pipe.save_pretrained("trained")


if __name__ == "__main__":
    main()
