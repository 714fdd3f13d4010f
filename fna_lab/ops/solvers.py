"""What stands for the inverse of the landmark kernel A."""

from __future__ import annotations

import torch
from torch import Tensor

from fna_lab.ops.checks import check_integer

LEAST_RIDGE = 1e-5  # beside A'A the rounding of float32 would be as large as less than that


def check_matrix(kernel: Tensor) -> None:
    """Raise unless `kernel` is a floating tensor of matrices."""
    if not isinstance(kernel, Tensor) or not kernel.is_floating_point():
        raise TypeError("Expected kernel to be a floating tensor [... r m].")
    if kernel.ndim < 2:
        raise ValueError(f"Expected kernel to have shape [... r m], got {tuple(kernel.shape)}.")


def check_square(kernel: Tensor) -> None:
    """Raise unless `kernel` is a floating tensor of square matrices."""
    if not isinstance(kernel, Tensor) or not kernel.is_floating_point():
        raise TypeError("Expected kernel to be a floating tensor [... m m].")
    if kernel.ndim < 2 or kernel.shape[-1] != kernel.shape[-2]:
        raise ValueError(f"Expected kernel to have shape [... m m], got {tuple(kernel.shape)}.")


def newton_schulz(kernel: Tensor, iters: int = 6) -> Tensor:
    """Approximate inverse by a cubic iteration that regularises: more of it is not better.

    Start A' / (largest column sum of each matrix), then
    Z <- 1/4 Z (13 I - A Z (15 I - A Z (7 I - A Z))).

    Args:
        kernel: A `[... m m]`, rows sum to 1.
        iters: number of iterations, at least 0.

    Returns:
        Z `[... m m]`.

    Raises:
        TypeError: `kernel` is not a floating tensor.
        ValueError: `kernel` is not square, or `iters` is negative.

    Source: Xiong et al. 2021 (Nystroemformer), equation 11, with the start taken per matrix.
    """
    check_square(kernel)
    check_integer("iters", iters, least=0)
    eye = torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
    # A part of a kernel may be all zero, where other landmarks take everything.
    most = kernel.sum(-2).amax(-1).clamp_min(torch.finfo(kernel.dtype).tiny)
    z = kernel.mT / most[..., None, None]
    for _ in range(iters):
        az = kernel @ z
        z = 0.25 * z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az)))
    return z


def ridge_solve(kernel: Tensor, values: Tensor, ridge: float = 1e-3) -> Tensor:
    """Apply the ridge inverse without forming it: (A'A + ridge I)^-1 A' B.

    Args:
        kernel: A `[... r m]`; with r > m this is a fit by least squares, with r < m the smallest
            solution: A' (A A' + ridge I)^-1 B.
        values: B `[... r d]`.
        ridge: regularisation lambda > 0, in the units of A squared.

    Returns:
        `[... m d]`.

    Raises:
        TypeError: `kernel` is not a floating tensor.
        ValueError: `kernel` is no matrix, or `ridge` is not positive.
    """
    check_matrix(kernel)
    if not ridge > 0:
        raise ValueError(f"Expected ridge to be > 0, got {ridge!r}.")
    dtype = kernel.dtype
    if ridge < LEAST_RIDGE and dtype == torch.float32:
        kernel, values = kernel.double(), values.double()
    wide = kernel.shape[-2] < kernel.shape[-1]  # the smaller of two Gram matrices that do
    gram = kernel @ kernel.mT if wide else kernel.mT @ kernel
    gram.diagonal(dim1=-2, dim2=-1).add_(ridge)
    # cholesky_ex does not synchronise with the host; the ridge keeps the matrix definite.
    factor = torch.linalg.cholesky_ex(gram).L
    # As close as `cholesky_solve`, and takes less time for a batch of small matrices.
    inverse = torch.cholesky_inverse(factor)
    solved = kernel.mT @ (inverse @ values) if wide else inverse @ (kernel.mT @ values)
    return solved.to(dtype)
