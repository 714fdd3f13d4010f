"""Where a host keeps its transformer blocks, its patch embedding, and its CLS token."""

from __future__ import annotations

from torch import nn

Blocks = tuple[str, list[nn.Module]]


def find_blocks(model: nn.Module, path: str | None = None) -> Blocks:
    """The vision blocks of a host and the dotted path of their list.

    A list of blocks is a `ModuleList` or `Sequential` of at least one module, all of one class,
    that hold linear layers and no convolution list of their own. Of several lists, one on a path
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


def says_cls(model: nn.Module) -> bool | None:
    """Whether a timm ViT says that it has CLS; None where the host does not say."""
    for module in model.modules():
        said = getattr(module, "has_class_token", None)
        if isinstance(said, bool):
            return said
        if hasattr(module, "num_prefix_tokens") and hasattr(module, "cls_token"):
            return module.cls_token is not None
    return None


def says_prefix(model: nn.Module) -> int:
    """Number of prefix tokens that the host states; 1 where it states none."""
    for module in model.modules():
        said = getattr(module, "num_prefix_tokens", None)
        if isinstance(said, int):
            return said
    return 1


def _is_list(module: nn.Module) -> bool:
    if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) == 0:
        return False
    first = type(module[0])
    return all(type(block) is first for block in module) and all(
        sum(isinstance(part, nn.Linear) for part in block.modules()) >= 2 for block in module
    )


def _speaks_of_vision(name: str) -> int:
    if any(word in name for word in ("text", "language", "decoder")):
        return -1
    return int("vis" in name)
