"""The landscape of tokens: places and colours by their features, norms as heights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fna_lab.report import canvas, token_maps
from fna_lab.report.record import samples

Record = Mapping[str, Any]
Arrays = Mapping[str, np.ndarray]

PERPLEXITY, NEIGHBOURS = 75, 10  # of the map of eigenvectors to colours
PULL = 12  # so many of the tallest tokens get a line down to the floor


def topology(record: Record, arrays: Arrays) -> Figure:
    """Tokens as a landscape, and the same colours and heights on the first pictures."""
    places, heights = (int(block) for block in arrays["topology_blocks"])
    colours, said = ncut_colours(arrays["map_ncut"], arrays["topology_samples"])
    place, rgb = arrays["map_place"], colours
    there = np.isfinite(place[..., 0])
    norm = arrays["map_norm"][heights][:, -place.shape[1] :]
    rows = min(len(place), token_maps.ROWS)
    figure = Figure(figsize=(11.0, max(4.6, 1.35 * rows + 0.8)), layout="constrained")
    figure.suptitle(
        f"Patch tokens: places and colours from the input of block {places}, heights from block "
        f"{heights}\n{canvas.heading(record)}",
        fontsize=10,
    )
    left, right = figure.subfigures(1, 2, width_ratios=(1.2, 1))  # type: ignore[misc]
    _landscape(left, place[there], norm[there], rgb[there])
    left.suptitle(f"colours: {said}", fontsize=9)
    panels = right.subplots(rows, 3, squeeze=False)
    for i, (first, second, third) in enumerate(panels):
        token_maps.picture(first, arrays["map_pixels"][i])
        shown = np.where(there[i][:, None], rgb[i], 1.0)
        token_maps.picture(second, token_maps.on_grid(shown, record))
        high = token_maps.on_grid(norm[i], record)
        token_maps.plain(right, third, high, "norm")
    titles = samples(record)[:-1], f"cut of block {places}", f"norm, block {heights}"
    for axes, text in zip(panels[0], titles, strict=True):
        axes.set_title(text, fontsize=9)
    return figure


def _landscape(figure: Any, place: np.ndarray, norm: np.ndarray, rgb: np.ndarray) -> None:
    """One point a token, and its shadow; the tallest ones with a line down to theirs."""
    axes = figure.add_subplot(projection="3d", computed_zorder=False)
    if place.shape[1] < 2:
        place = np.pad(place, ((0, 0), (0, 1)))
    x, y = place.T
    low, high = float(norm.min()), float(norm.max())
    floor = max(0.0, low - 0.35 * (high - low)) if high > low else 0.0
    axes.scatter(x, y, floor, c=rgb, s=4, alpha=0.3, linewidths=0, depthshade=False)
    for i in np.argsort(norm)[::-1][:PULL]:
        axes.plot([x[i]] * 2, [y[i]] * 2, [floor, norm[i]], color=rgb[i], linewidth=0.8)
    order = np.argsort(y)[::-1]  # near ones over far ones
    style = {"s": 10, "linewidths": 0, "depthshade": False}
    axes.scatter(x[order], y[order], norm[order], c=rgb[order], **style)
    axes.set_zlim(floor, high + 0.03 * (high - floor))
    for axis, said in zip("xyz", ("component 1", "component 2", "norm"), strict=True):
        getattr(axes, f"set_{axis}label")(said, fontsize=9, labelpad=0)
    axes.tick_params(labelsize=8, pad=0)
    axes.view_init(elev=22, azim=-60)
    axes.set_box_aspect((1, 1, 0.8), zoom=0.92)


def ncut_colours(vectors: np.ndarray, samples: np.ndarray) -> tuple[np.ndarray, str]:
    """Eigenvectors of a cut as red, green and blue.

    A t-SNE to three dimensions of some tokens, the others by their nearest neighbours among
    these; each dimension from its 5th to its 95th percentile. Without scikit-learn the first
    three eigenvectors after the constant one.

    Args:
        vectors: `[... k]`, NaN where there is no token.
        samples: tokens that the t-SNE is of, as indices into those that are there.

    Returns:
        `[... 3]` from 0 to 1, NaN where there is no token; and what was done, in words.

    Source: the colours of the public package nystrom_ncut, which takes 1,000 samples and
    perplexity 150; half of both cost a quarter.
    """
    there = np.isfinite(vectors).all(-1)
    points = vectors[there].astype(np.float64)
    try:
        from sklearn.manifold import TSNE
        from sklearn.neighbors import NearestNeighbors
    except ImportError:
        found, said = points[:, :3], "first three eigenvectors of the normalised cut"
    else:
        few = points[samples]
        perplexity = max(1, min(PERPLEXITY, len(few) // 2))
        flat = TSNE(3, perplexity=perplexity, init="pca", random_state=0, method="exact")
        placed = flat.fit_transform(few).astype(np.float64)
        near = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(few)), n_jobs=1).fit(few)
        distance, index = near.kneighbors(points)
        weight = 1 / (distance + 1e-6 * distance.mean() + 1e-12)
        found = (placed[index] * weight[..., None]).sum(1) / weight.sum(1, keepdims=True)
        said = f"t-SNE of {points.shape[1]} eigenvectors of the normalised cut"
    low, high = np.percentile(found, (5, 95), axis=0)
    found = np.clip((found - low) / np.where(high > low, high - low, 1), 0, 1)
    found = np.pad(found, ((0, 0), (0, 3 - found.shape[1])))
    colours = np.full((*there.shape, 3), np.nan)
    colours[there] = found
    return colours, said
