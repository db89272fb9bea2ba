"""Triton kernels, one file an op: the kernel and its launcher. Installed as ``ddpm_fast.kernels``.

An op is put together from ``noise`` (Philox and normals), ``algebra`` (the formulas) and ``tile``
(where elements lie); ``launch`` cuts problems into programs. ``support`` says whether Triton runs
here, and alone can be imported without it.
"""
