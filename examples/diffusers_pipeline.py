"""A diffusers pipeline, accelerated, sampled and saved.

The pipeline here is tiny and untrained, so that this runs offline in seconds. With real weights:

    pipe = DDPMPipeline.from_pretrained("google/ddpm-cifar10-32")
    ddpm_fast.accelerate(pipe)
    pipe(batch_size=16, generator=torch.Generator().manual_seed(0)).images[0].save("ship.png")

Run: python examples/diffusers_pipeline.py [folder to save the pipeline in]
"""

from __future__ import annotations

import sys

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

import ddpm_fast


def tiny_pipeline() -> DDPMPipeline:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    pipe = DDPMPipeline(unet=unet.eval(), scheduler=DDPMScheduler(variance_type="fixed_large"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: DDPMPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return pipe(4, generator, num_inference_steps=50, output_type="pt").images


def main() -> None:
    folder = sys.argv[1] if len(sys.argv) > 1 else "pipeline"
    pipe = tiny_pipeline()
    stock = draw(pipe)
    ddpm_fast.accelerate(pipe)  # the same object; its scheduler takes fused steps from here on
    fast = draw(pipe)
    print(
        f"4 images of 50 steps; largest difference to the stock pipeline: {dist(fast, stock):.1e}"
    )

    pipe.save_pretrained(folder)  # as a stock pipeline: it loads where there is no ddpm_fast
    loaded = DDPMPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    print(f"loaded from {folder}/: {type(loaded.scheduler).__name__}, {dist(draw(loaded), stock)}")

    # Images that are a function of their seed and number alone, whatever the batch.
    sampler = ddpm_fast.Sampler.from_pipeline(pipe, num_steps=50)
    eight = sampler.sample((8, 3, 16, 16), seed=7)
    one = sampler.sample((1, 3, 16, 16), seed=7, sample_ids=[5])
    print(f"image 5 of seed 7, alone and in a batch of 8: {dist(one[0], eight[5]):.1e} apart")


def dist(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


if __name__ == "__main__":
    main()
