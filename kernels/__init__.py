"""Triton kernels, one file an op; installed as ``ddpm_fast.kernels``. There are none yet."""
