"""Where a host keeps its transformer blocks, its patch embedding, and its CLS token."""

from __future__ import annotations

from torch import nn

Blocks = tuple[str, list[nn.Module]]


def find_blocks(model: nn.Module, path: str | None = None) -> Blocks:
    """The vision blocks of a host and the dotted path of their list.

    A list of blocks is a `ModuleList` or `Sequential` of at least one module, all of one class,
    that hold linear layers. Of several lists, one on a path
    that speaks of vision wins, one that speaks of text or a decoder loses; then the longest.

    Args:
        model: the host.
        path: the dotted path, where it is known.

    Returns:
        The path and the blocks in order.

    Raises:
        TypeError: the host is no module.
        ValueError: there is no such list, or the path does not lead to one.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected model to be a torch.nn.Module, got {model!r}.")
    lists = {
        name: list(module.children()) for name, module in model.named_modules() if _is_list(module)
    }
    if path is not None:
        if path not in lists:
            near = ", ".join(lists) or "none"
            raise ValueError(f"blocks={path!r} is no list of blocks of this host; found: {near}.")
        return path, lists[path]
    # A block's own inner lists (experts, an MLP written as Sequential) are not the host's.
    outer = {
        name: blocks
        for name, blocks in lists.items()
        if not any(name.startswith(f"{other}.") for other in lists if other != name)
    }
    if not outer:
        raise ValueError(
            f"{type(model).__name__} has no list of transformer blocks; "
            "pass blocks='dotted.path' if it keeps them elsewhere."
        )
    name = max(outer, key=lambda name: (_speaks_of_vision(name), len(outer[name])))
    if isinstance(getattr(model, "visual", None), nn.Module) and not name.startswith("visual."):
        raise ValueError(
            f"The vision tower of {type(model).__name__} has no list of transformer blocks; pass "
            f"blocks={name!r} to patch the blocks that there are."
        )
    return name, outer[name]


def find_patch_embedding(model: nn.Module, blocks_path: str) -> nn.Module | None:
    """The convolution that cuts pictures into patches, None where the host has none.

    Of a stem of several convolutions, the last before the blocks.
    """
    parent, blocks = blocks_path, model.get_submodule(blocks_path)
    inside = set(blocks.modules())
    while parent:
        parent = parent.rpartition(".")[0]
        found, behind = None, False
        for module in model.get_submodule(parent).modules():
            behind = behind or module is blocks
            if behind and found is not None:
                break
            cuts = isinstance(module, nn.Conv2d) and module.kernel_size == module.stride
            if cuts and module not in inside:
                found = module
        if found is not None:
            return found
    return None


class Layout:
    """Which tokens of a tower are no patch tokens.

    Args:
        model: the host.
        path: dotted path of its blocks: what the modules around them say is asked, innermost
            first, and not what another tower says.

    Attributes:
        cls: whether token 0 is CLS; None where nobody says.
        prefix: number of prefix tokens; 1 where nobody says.
    """

    def __init__(self, model: nn.Module, path: str) -> None:
        self.cls: bool | None = None
        self.prefix = 1
        around = path
        while around:
            around = around.rpartition(".")[0]
            tower = model.get_submodule(around)
            prefix = getattr(tower, "num_prefix_tokens", None)
            cls = getattr(tower, "has_class_token", None)
            if not isinstance(cls, bool) and prefix is not None and hasattr(tower, "cls_token"):
                cls = tower.cls_token is not None
            self.prefix = prefix if isinstance(prefix, int) else self.prefix
            self.cls = cls if isinstance(cls, bool) else None
            if isinstance(prefix, int) or self.cls is not None:
                break

    def prefix_of(self, size: int, grid: tuple[int, int] | None) -> int:
        """Tokens before the patch tokens of a grid, of `size` tokens that are the host's own."""
        if grid is not None and 0 <= size - grid[0] * grid[1] < 64:
            return size - grid[0] * grid[1]
        return self.prefix

    def has_cls(self, prefix: int) -> bool:
        """Whether token 0 is CLS, where there are so many prefix tokens."""
        return prefix > 0 if self.cls is None else self.cls


def _is_list(module: nn.Module) -> bool:
    if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) == 0:
        return False
    first = type(module[0])
    if issubclass(first, nn.ModuleList | nn.ModuleDict):  # a list of stages, which is not called
        return False
    return all(type(block) is first for block in module) and all(
        sum(isinstance(part, nn.Linear) for part in block.modules()) >= 2 for block in module
    )


def _speaks_of_vision(name: str) -> int:
    if any(word in name for word in ("text", "language", "decoder")):
        return -1
    return int("vis" in name)
