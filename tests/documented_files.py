"""The files that blocks in the documents take for given, since their reader has them."""

from __future__ import annotations

import json
from pathlib import Path

import openai_unet
import torch

OPTIONS = {"image_size": 64, "num_channels": 32, "num_res_blocks": 1, "learn_sigma": True}


def prepare_files(code: str, folder: Path) -> None:
    """Those that ``code`` names, in ``folder``; small ones."""
    if "64x64_diffusion.pt" in code:
        (folder / "options.json").write_text(json.dumps(OPTIONS))
        torch.manual_seed(0)
        torch.save(openai_unet.create_model(**OPTIONS).state_dict(), folder / "64x64_diffusion.pt")
