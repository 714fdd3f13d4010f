"""Massive tokens, attention sinks and attention that is linear without training, in any ViT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fna_lab.backbone.budget import solve_budget
    from fna_lab.backbone.patch import patch

__all__ = ["__version__", "patch", "solve_budget"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Lazy, so that `import fna_lab` stays fast and imports neither timm nor lightning.
    if name == "patch":
        from fna_lab.backbone.patch import patch

        return patch
    if name == "solve_budget":
        from fna_lab.backbone.budget import solve_budget

        return solve_budget
    raise AttributeError(f"module 'fna_lab' has no attribute {name!r}")
