"""Triton kernels for CUDA. No part of `fna_lab.ops` needs them; `switch` says when they serve."""
