"""Pictures of a fitted mixture: its density, its clusters, and what "auto" has tried.

Needs the extra ``cli``, which brings matplotlib. No state of pyplot is touched.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cpmm.clusters import clusters_of, standardized, telling
from cpmm.fitted import FittedMixture

try:
    from matplotlib.figure import Figure

    from cpmm import figures
    from cpmm.fonts import choose_fonts, drawable
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "matplotlib":
        raise
    said = "matplotlib is not installed: pip install 'cpmm[cli]'"
    raise ModuleNotFoundError(said, name=error.name) from None

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KINDS = ("auto", "density", "profiles", "images", "tried")
N_DRAWS = 4000  # where the levels of a density are found
N_CLUSTERS = 20  # shown, and rows of images
N_PROFILES = 8
N_FEATURES = 30  # of a profile
HELD = (0.99, 0.9, 0.5)  # of the probability, within a line
SIZES = {"n_components": "components", "n_factors": "factors", "shrinkage": "shrinkage"}
VALUES = {
    "bic": "BIC",
    "folds": "held out by folds, -nats a row",
    "validation": "held out, -nats a row",
}


class Picture(Figure):
    """A figure that a notebook shows, whether or not pyplot is in use there."""

    def _repr_png_(self) -> bytes:
        stream = io.BytesIO()
        self.savefig(stream, format="png", dpi=100)
        return stream.getvalue()


def plot(
    model: Any,
    X: Any = None,
    kind: str = "auto",
    *,
    features: Sequence[str | int] | str | None = None,
    image_shape: Sequence[int] | None = None,
) -> Picture:
    """Draw a mixture.

    Args:
        model: A fitted estimator, or a :class:`FittedMixture`.
        X: Points to draw it over, (N, M), as an array or a data frame that has its columns. None
            draws points of the mixture for "density", and means alone for "images"; "profiles"
            and "tried" are of the model alone.
        kind: What is drawn. "density": of one column with a histogram, or of two, with points and
            lines that hold 50, 90 and 99 % of the probability. "profiles": mean and deviation of
            each cluster, in deviations of the whole mixture from its mean; of many columns those
            that differ most. "images": the mean of each cluster as a picture, and some of its
            points. "tried": what "auto" has tried. "auto": images if there is a shape, the density
            of one or two columns, else profiles.
        features: Names or positions of columns, or one name: one or two for a density, which is
            then their marginal, or those of profiles.
        image_shape: (height, width) or (channels, height, width) of rows that are images; a mixture
            of images knows it.

    Returns:
        A new figure: a notebook shows it, ``savefig("x.png")`` writes it.

    Raises:
        ValueError: If the model is not fitted, or cannot be drawn so with such points.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}: expected one of {', '.join(KINDS)}")
    if kind == "tried":
        return _plot_tried(model)
    fitted = getattr(model, "mixture_", model)
    if not isinstance(fitted, FittedMixture):
        raise ValueError(
            f"model is a {type(model).__name__} without a mixture: expected a FittedMixture or an "
            "estimator after fit"
        )
    fitted = replace(fitted, mixture=fitted.mixture.to("cpu"))
    shape = _shape(fitted, image_shape)
    features = [features] if isinstance(features, str) else features
    n_shown = fitted.n_features if features is None else len(features)
    if kind == "auto":
        kind = "images" if shape and features is None else "profiles"
        kind = "density" if kind == "profiles" and n_shown <= 2 else kind
    with torch.no_grad():
        x = _points(fitted, X)
        if kind == "images":
            return _plot_images(fitted, x, shape)
        if kind == "profiles":
            return _plot_profiles(fitted, features)
        return _plot_density(fitted, x, features)


def _points(fitted: FittedMixture, X: Any) -> Tensor | None:
    """Points, (N, M), float64, in the order of the mixture's columns."""
    if X is None:
        return None
    columns = list(getattr(X, "columns", ()))
    if columns and all(isinstance(name, str) for name in columns):
        lacking = [name for name in fitted.feature_names if name not in columns]
        if lacking:
            raise ValueError(
                f"X has no column {lacking[0]!r}, which the mixture has: give it, or an array of "
                f"the {fitted.n_features} columns in their order"
            )
        X = X[list(fitted.feature_names)]
    X = X.detach().cpu().numpy() if isinstance(X, Tensor) else X
    try:
        x = torch.from_numpy(np.array(X, dtype=np.float64))
    except (TypeError, ValueError) as error:
        raise ValueError(f"X must hold numbers, (N, {fitted.n_features}): {error}") from None
    x = x.reshape(len(x), -1) if x.ndim > 2 else x  # images
    if x.ndim != 2 or not len(x) or x.shape[1] != fitted.n_features:
        raise ValueError(f"X has shape {tuple(x.shape)}: expected (N, {fitted.n_features})")
    return x


def _shape(fitted: FittedMixture, wanted: Sequence[int] | None) -> tuple[int, int, int] | None:
    if wanted is None:
        return fitted.image_shape
    shape = tuple(wanted) if isinstance(wanted, Sequence) else ()
    shape = (1, *shape) if len(shape) == 2 else shape
    if len(shape) != 3 or int(np.prod(shape)) != fitted.n_features:
        raise ValueError(
            f"image_shape is {wanted}: expected (height, width) or (channels, height, width) of "
            f"{fitted.n_features} features"
        )
    return shape[0], shape[1], shape[2]


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _plot_density(
    fitted: FittedMixture, x: Tensor | None, features: Sequence[str | int] | None
) -> Picture:
    n_shown = fitted.n_features if features is None else len(features)
    if n_shown not in (1, 2):
        raise ValueError(
            f"a density is drawn of one or two columns: got {n_shown}; name them, as features="
            f"{list(fitted.feature_names[:2])}"
        )
    if fitted.preprocessing.levels is not None:
        raise ValueError("a density of grey levels is not drawn: take kind='images'")
    drawn, cluster = fitted.sample(N_DRAWS, _generator())
    if x is not None:
        x = x if n_shown == 1 else x[figures._thin(len(x), figures.N_POINTS)]
        cluster = fitted.cluster_responsibilities(x, _generator()).argmax(1)
    index = list(range(n_shown)) if features is None else fitted._index(features)
    part = fitted if features is None else fitted.marginal(index)
    drawn = drawn[:, index]
    seen = drawn if x is None else x[:, index]
    whole = ~seen.isnan().any(1)
    if not bool(whole.any()):
        raise ValueError(f"no row of X has a value of {' and '.join(part.feature_names)}")
    seen, cluster = seen[whole].numpy(), cluster[whole].numpy()
    picture, axes = _axes(0.7 * figures.WIDTH if n_shown == 1 else figures.WIDTH)
    draw = _draw_line if n_shown == 1 else _draw_plane
    draw(axes, part, seen, cluster, drawn)
    names = [drawable(name) for name in part.feature_names]
    axes.set_xlabel(names[0], parse_math=False)
    axes.set_ylabel(names[1] if n_shown == 2 else "density", parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    return _finish(picture, fitted)


def _draw_line(
    axes: Axes, part: FittedMixture, seen: np.ndarray, cluster: np.ndarray, drawn: Tensor
) -> None:
    axes.hist(seen[:, 0], bins=40, density=True, color="#d9d9d9", zorder=0)
    low, high = axes.get_xlim()
    grid = torch.linspace(low, high, 500, dtype=torch.float64)[:, None]
    density = part.log_prob(grid, _generator()).exp()
    share = part.cluster_responsibilities(grid, _generator())
    if part.mixture.n_clusters > 1:
        for c in np.unique(cluster):
            axes.plot(grid[:, 0], density * share[:, c], color=figures._colour(c), lw=1.3)
    axes.plot(grid[:, 0], density, color="black", lw=1.6)


def _draw_plane(
    axes: Axes, part: FittedMixture, seen: np.ndarray, cluster: np.ndarray, drawn: Tensor
) -> None:
    figures._scatter(axes, seen, cluster, size=5)
    low, high = np.quantile(seen, [0.001, 0.999], axis=0)
    margin = 0.08 * (high - low) + 1e-9
    low, high = low - margin, high + margin
    x, y = (torch.linspace(low[i], high[i], 150, dtype=torch.float64) for i in (0, 1))
    grid = torch.cartesian_prod(x, y)
    log_prob = part.log_prob(grid, _generator()).reshape(150, 150).T
    # A line at the density that a share of the draws exceeds holds that share.
    levels = np.quantile(part.log_prob(drawn, _generator()).numpy(), [1 - p for p in HELD])
    style: dict[str, Any] = {"colors": "black", "linewidths": (0.6, 0.9, 1.3)}
    axes.contour(x, y, log_prob, levels=np.unique(levels), linestyles="solid", **style)
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))


def _finish(picture: Picture, fitted: FittedMixture) -> Picture:
    """Explain the colours of clusters, if they are few."""
    clusters = sorted(clusters_of(fitted), key=lambda cluster: cluster.index)
    if 1 < len(clusters) <= figures.N_LEGEND:
        handles = [
            figures.Line2D(
                [], [], ls="", marker=figures._marker(one.index), color=figures._colour(one.index),
                label=one.name,
            )
            for one in clusters
        ]  # fmt: skip
        figures._legend(picture, 3, handles=handles)
    return choose_fonts(picture)  # ty: ignore[invalid-explicit-return]


def _plot_profiles(fitted: FittedMixture, features: Sequence[str | int] | None) -> Picture:
    clusters, mean, deviation = standardized(fitted)
    chosen = fitted._index(features or range(fitted.n_features))
    fitted.mixture.require_features(chosen)
    shown = [chosen[i] for i in telling(clusters, mean[:, chosen], N_FEATURES)]
    heaviest = clusters[:N_PROFILES]
    n_columns = min(4, len(heaviest))
    n_rows = -(-len(heaviest) // n_columns)
    picture = _picture(n_rows * (0.5 + 0.17 * len(shown)) + 0.4)
    grid = picture.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False)
    panels = list(grid.flat)
    y = np.arange(len(shown))
    for axes in panels:
        axes.set_visible(False)
    for axes, cluster, m, d in zip(panels, heaviest, mean[:, shown], deviation[:, shown]):  # noqa: B905
        axes.set_visible(True)
        colour = figures._colour(cluster.index)
        axes.axvline(0, color=figures.GREY, lw=0.8)
        axes.errorbar(m.numpy(), y, xerr=d.numpy(), fmt="o", ms=4, lw=1.3, color=colour)
        axes.set_title(cluster.name, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(axis="y", color="#eeeeee", lw=0.6)
        axes.set_axisbelow(True)
    names = [drawable(fitted.feature_names[m], 30) for m in shown]
    panels[0].set_yticks(y, names, fontsize=8, parse_math=False)
    panels[0].set_ylim(len(shown) - 0.4, -0.6)
    said = "deviations from the mean of all"
    if len(shown) < len(chosen):
        said += f"\n{len(shown)} of {len(chosen)} columns, those that differ most"
    if len(heaviest) < len(clusters):
        said += f"\n{len(heaviest)} of {len(clusters)} clusters, the heaviest"
    picture.supxlabel(said, fontsize=9)
    return choose_fonts(picture)  # ty: ignore[invalid-explicit-return]


def _plot_images(
    fitted: FittedMixture, x: Tensor | None, shape: tuple[int, int, int] | None
) -> Picture:
    if shape is None:
        raise ValueError("the rows have no shape of images: give image_shape=(height, width)")
    clusters = clusters_of(fitted)[:N_CLUSTERS]
    means = np.stack([cluster.mean().numpy() for cluster in clusters])  # (C, M)
    n_columns = 10 if x is None else 9
    if x is None:
        images = np.full((-(-len(means) // n_columns), n_columns, means.shape[1]), np.nan)
        images.reshape(-1, means.shape[1])[: len(means)] = means
    else:
        x = x[figures._thin(len(x), figures.N_POINTS)]
        found = fitted.cluster_responsibilities(x, _generator()).argmax(1)
        images = np.full((len(means), n_columns, means.shape[1]), np.nan)
        for row, cluster, mean in zip(images, clusters, means, strict=True):
            own = x[found == cluster.index][: n_columns - 1].numpy()
            row[0], row[1 : 1 + len(own)] = mean, own
    low, high = np.nanquantile(images, [0.005, 0.995])
    # The names stand above the images, in the gaps between the rows.
    _, height, width = shape
    pixel = 0.98 * figures.WIDTH / (n_columns * (width + figures._gap(width)))  # inches
    label = 0.2 / pixel
    picture, axes = _axes(len(images) * (height * pixel + 0.2) + 0.25)
    centres = figures._draw_mosaic(axes, figures._grey(images, low, high), shape, row_gap=label)
    axes.set_ylim(centres[-1] + height / 2, centres[0] - height / 2 - label)
    for i, cluster in enumerate(clusters):
        row, column = divmod(i, n_columns) if x is None else (i, 0)
        place = column * (width + figures._gap(width)), centres[row] - height / 2 - 0.15 * label
        text = f"{cluster.index}: {100 * cluster.weight:.0f} %" if x is None else cluster.name
        axes.text(*place, text, fontsize=8, va="bottom")
    return picture


def _plot_tried(model: Any) -> Picture:
    tried: Sequence[Mapping[str, Any]] = getattr(model, "tried_", [])
    if not tried:
        raise ValueError(
            "nothing was tried: fit with a size at 'auto'; load does not bring tried_ back"
        )
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for row in tried:
        if np.isfinite(row["value"]):
            rows.setdefault(str(row["criterion"]), []).append(row)
    panels = [
        (criterion, name)
        for criterion, found in rows.items()
        for name in SIZES
        if len({row[name] for row in found}) > 1
    ] or [(criterion, "n_components") for criterion in rows]
    if not panels:
        raise ValueError(f"none of the {len(tried)} sizes that were tried gave a density")
    n_columns = min(3, len(panels))
    n_rows = -(-len(panels) // n_columns)
    picture = _picture(2.3 * n_rows + 0.3)
    for i, (criterion, name) in enumerate(panels):
        axes = picture.add_subplot(n_rows, n_columns, i + 1)
        _draw_tried(axes, rows[criterion], name, [r for r in rows[criterion] if _taken(r, model)])
        axes.set_xlabel(SIZES[name], fontsize=9)
        if not i % n_columns or panels[i - 1][0] != criterion:
            axes.set_ylabel(VALUES.get(criterion, criterion), fontsize=8)
    said = "lower is better; a line joins what differs in one size alone; star: what was taken"
    picture.supxlabel(said, fontsize=8)
    return picture


def _taken(row: Mapping[str, Any], model: Any) -> bool:
    """Whether these are the sizes of the model."""
    counts = ("n_components_", "n_clusters_", "n_trajectories_")
    return (
        row["n_components"] in {getattr(model, name, None) for name in counts}
        and row["n_factors"] == model.n_factors_
        and row["shrinkage"] == model.shrinkage_
    )


def _draw_tried(
    axes: Axes,
    rows: Sequence[Mapping[str, Any]],
    name: str,
    taken: Sequence[Mapping[str, Any]],
) -> None:
    """Draw the values of one criterion over one of the sizes, with a star at what was taken."""
    places = sorted({row[name] for row in rows})
    lines: dict[tuple, list[tuple[int, float]]] = {}
    for row in rows:
        rest = tuple(row[other] for other in SIZES if other != name)
        lines.setdefault(rest, []).append((places.index(row[name]), row["value"]))
    for line in lines.values():
        axes.plot(
            *zip(*sorted(line), strict=True), color=figures.PALETTE[0], marker="o", ms=4, lw=1
        )
    star: dict[str, Any] = {"marker": "*", "ms": 12, "color": figures.PALETTE[1], "mec": "black"}
    for row in taken:
        axes.plot(places.index(row[name]), row["value"], **star, zorder=3)
    axes.set_xticks(range(len(places)), [f"{place:g}" for place in places])
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def _picture(height: float) -> Picture:
    options: dict[str, Any] = {"dpi": figures.DPI, "layout": "constrained", "facecolor": "white"}
    return Picture(figsize=(figures.WIDTH, height), **options)


def _axes(height: float) -> tuple[Picture, Axes]:
    picture = _picture(height)
    return picture, picture.add_subplot()
