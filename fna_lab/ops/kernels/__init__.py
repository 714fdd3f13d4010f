"""Kernels that no part of `fna_lab.ops` needs: in Triton for CUDA, in C++ for processors.

`switch` says when they serve.
"""
