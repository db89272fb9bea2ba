"""What torch.compile leaves as it is: q_sample, and what p_losses does around the model.

Kernels have nothing to gain from it, and by Python's state it would compile anew at each step.

A module of its own, for this has torch load its compiler, which takes a second.
"""

from __future__ import annotations

import torch

from .training import FastTraining

x_t_of = torch.compiler.disable(FastTraining._x_t)
batch_of = torch.compiler.disable(FastTraining._batch)
loss_of = torch.compiler.disable(FastTraining._loss)
