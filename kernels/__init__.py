"""Triton kernels, one file an op: the kernel and its launcher. Installed as ``ddpm_fast.kernels``.

An op is ``noise`` (Philox and normals), ``algebra`` (the formulas) and ``tile`` (where elements lie)
put together; ``launch`` cuts problems into programs, ``support`` says whether Triton runs here, and is
the one module that can be imported without it.
"""
