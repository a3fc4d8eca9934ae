"""The paper's figures, drawn from plain arrays.

Every function returns a new ``Figure`` and touches no state of pyplot. All are equally wide, and
narrow beside their type, to be read on a phone and enlarged on a desk. Past seven groups the shape
of the marker changes with the colour. Clouds of points are rasterized, even in an SVG file.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.textpath import TextPath
from matplotlib.ticker import MaxNLocator, NullLocator

from cpmm.fonts import choose_fonts, drawable

if TYPE_CHECKING:
    import pandas as pd

WIDTH = 5.0  # inches
DPI = 200  # of the rasterized parts
# Okabe and Ito, for colour-blind readers, without their yellow, which is lost on white.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#000000")
MARKERS = "o^sDv"
GREY = "#8c8c8c"  # points of no class, and data behind a model
N_POINTS = 2500  # of a scatter panel
N_LEGEND = 12  # groups, beyond which a legend says nothing


def plot_spaces(
    spaces: np.ndarray,
    positions: np.ndarray,
    label: np.ndarray | None = None,
    image_shape: tuple[int, int, int] | None = None,
    n_images: int = 10,
) -> Figure:
    """Draw the curriculum from the latent to the input space (Figure 2).

    Images: one row a space, the same images in every row, black and white at equal distances from
    zero. Tables: one panel a space, along the first two principal components of the input space if
    there are more than two features; each panel has a scale of its own.

    Args:
        spaces: The same points in every space, (V', N, M).
        positions: v of every space, 1 latent and 0 input, (V',).
        label: Class of each point, (N,); -1 is none.
        image_shape: (channels, height, width), None for tables.
        n_images: Images of a row, of as many classes as there are.

    Raises:
        ValueError: If shapes disagree.
    """
    spaces, positions = np.asarray(spaces), np.asarray(positions)
    if spaces.ndim != 3 or len(spaces) != len(positions):
        raise ValueError(
            f"spaces must be (V', N, M) with one position each: got shape {spaces.shape} and "
            f"{len(positions)} positions"
        )
    _check_group("label", label, spaces.shape[1])
    titles = [_name_position(v) for v in positions]
    if image_shape is not None:
        shown = spaces[:, _examples(label, spaces.shape[1], n_images)]
        reach = np.quantile(np.abs(shown), 0.995, axis=(1, 2))[:, None, None] + 1e-12
        side = (WIDTH - 1.15) / shown.shape[1]  # beside the titles
        figure, axes = _axes(len(shown) * side * _aspect(image_shape) + 0.1)
        centres = _draw_mosaic(axes, _grey(shown, -reach, reach), image_shape)
        axes.set_yticks(centres, titles, fontsize=9)
        axes.set_anchor("W")  # centred, the layout finds too little room for the titles
        return figure
    plane = _Plane.of(spaces[np.argmin(positions)])
    n_columns = 2 if len(spaces) in (2, 4) else 3
    n_rows = -(-len(spaces) // n_columns)
    figure = _figure(n_rows * WIDTH / n_columns * 1.02)
    for i, (space, title) in enumerate(zip(spaces, titles, strict=True)):
        axes = figure.add_subplot(n_rows, n_columns, i + 1)
        points = plane(space)
        _scatter(axes, points, label, size=3)
        _limit(axes, points)
        axes.set_title(title, fontsize=10)
        axes.tick_params(labelsize=8)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(3, integer=True))
    if plane.n_features > 2:
        figure.supxlabel(plane.names[0], fontsize=10)
        figure.supylabel(plane.names[1], fontsize=10)
    return figure


def plot_samples(
    data: np.ndarray | None,
    samples: np.ndarray,
    label: np.ndarray | None,
    cluster: np.ndarray,
    image_shape: tuple[int, int, int] | None = None,
    n_images: int = 8,
) -> Figure:
    """Draw data by class beside samples of the mixture by cluster (Figure 3).

    Classes and clusters are numbered independently, and so are their colours. Images: a row for
    each class and each cluster, on one grey scale.

    Args:
        data: Points, (N, M); None draws the samples alone.
        samples: Points drawn from the mixture, (N', M).
        label: Class of each data point, (N,); -1 is none. None if there are no classes.
        cluster: Cluster that each sample came from, (N',).
        image_shape: (channels, height, width), None for tables.
        n_images: Images of a row of either.

    Raises:
        ValueError: If shapes disagree.
    """
    samples = np.asarray(samples)
    shown = [(samples, cluster, "samples, by cluster")]
    if data is not None:
        data = np.asarray(data)
        shown.insert(0, (data, label, "data" if label is None else "data, by class"))
        _check_group("label", label, len(data))
    first = shown[0][0]
    if first.ndim != 2 or samples.ndim != 2 or first.shape[1] != samples.shape[1]:
        raise ValueError(
            f"data and samples must be (N, M) and (N', M): got {first.shape} and {samples.shape}"
        )
    _check_group("cluster", cluster, len(samples))
    if image_shape is not None:
        low, high = first.min(), first.max()
        n_rows = len(np.unique(cluster))
        grids = [_grid(x, group, n_images, n_rows) for x, group, _ in shown]
        tallest = max(len(grid) for grid in grids)
        width = 0.92 * WIDTH / len(shown) / n_images  # of an image
        figure = _figure(tallest * width * _aspect(image_shape) + 0.35)
        for i, (grid, (_, _, title)) in enumerate(zip(grids, shown, strict=True)):
            axes = figure.add_subplot(1, len(shown), i + 1)
            _draw_mosaic(axes, _grey(grid, low, high), image_shape)
            axes.set_title(title, fontsize=10)
            axes.set_anchor("N")
        return figure
    plane = _Plane.of(first)
    everything = np.concatenate([plane(x) for x, _, _ in shown])
    figure = _figure(WIDTH / 2 + 0.35)
    for i, (x, group, title) in enumerate(shown):
        axes = figure.add_subplot(1, len(shown), i + 1)
        _scatter(axes, plane(x), group, size=4)
        _limit(axes, everything)
        _name_axes(axes, plane)
        axes.set_title(title, fontsize=10)
        if i:
            axes.set_ylabel("")
            axes.tick_params(labelleft=False)
    return figure


def plot_trajectory_means(
    mean: np.ndarray,
    image_shape: tuple[int, int, int] | None = None,
    row_labels: Sequence[str] | None = None,
    share: np.ndarray | None = None,
    data: np.ndarray | None = None,
    n_shown: int = 25,
) -> Figure:
    """Draw the means along every trajectory, from t = 0 to t = 1 (Figures 4 and 5).

    Images: a row for each trajectory, read from left to right. Tables: a path for each trajectory,
    along two principal components (of the data if given) if there are more than two features;
    a path darkens with pseudotime and ends in a square. Components that are the most likely one for
    no point are faded in a row of images, hollow on a path.

    Args:
        mean: Means of the components in the order of pseudotime, (C, G, M).
        image_shape: (channels, height, width), None for tables.
        row_labels: Names of the trajectories, C strings.
        share: Share of the points for which each component is the most likely, (C, G).
        data: Points behind the paths, (N, M); images do not need them.
        n_shown: Largest number of images in a row; more pseudotimes are thinned evenly.

    Raises:
        ValueError: If shapes disagree.
    """
    mean = np.asarray(mean)
    share = np.ones(mean.shape[:2]) if share is None else np.asarray(share)
    if mean.ndim != 3 or share.shape != mean.shape[:2]:
        raise ValueError(
            f"mean must be (C, G, M) and share (C, G): got {mean.shape} and {share.shape}"
        )
    n_clusters = len(mean)
    row_labels = [f"cluster {c}" for c in range(n_clusters)] if row_labels is None else row_labels
    if len(row_labels) != n_clusters:
        raise ValueError(f"{n_clusters} trajectories need as many labels: got {len(row_labels)}")
    row_labels = [drawable(text, 45) for text in row_labels]
    if image_shape is None:
        return _plot_paths(mean, row_labels, share == 0, data)

    thin = _thin(mean.shape[1], n_shown)
    shown, idle = mean[:, thin], share[:, thin] == 0
    images = _grey(shown, *np.quantile(shown, [0.005, 0.995]))
    images = np.where(idle[..., None], 0.25 * images + 0.75, images)
    # Labels stand in the gaps between the rows: their height in pixels follows from that in inches.
    _, height, width = image_shape
    gap = _gap(width)
    n_columns = max(len(thin), 12)
    pixel = 0.98 * WIDTH / (n_columns * (width + gap))
    label_height = 0.22
    figure, axes = _axes(n_clusters * (height * pixel + label_height) + label_height + 0.1)
    centres = _draw_mosaic(axes, images, image_shape, row_gap=label_height / pixel)
    axes.set_xlim(-0.5, n_columns * (width + gap) - gap - 0.5)
    reach = height / 2 + label_height / pixel
    axes.set_ylim(centres[-1] + reach, centres[0] - reach)
    for centre, text in zip(centres, row_labels, strict=True):
        top = centre - height / 2 - 0.15 * label_height / pixel
        axes.text(-0.5, top, text, fontsize=9, va="baseline", parse_math=False)
    foot = centres[-1] + height / 2 + 0.2 * label_height / pixel
    axes.text(-0.5, foot, "t = 0", fontsize=9, va="top")
    last = (len(thin) - 1) * (width + gap) + width - 0.5
    axes.text(last, foot, "t = 1", fontsize=9, va="top", ha="right")
    return choose_fonts(figure)


def plot_components(
    mean: np.ndarray,
    covariance: np.ndarray,
    cluster: np.ndarray,
    data: np.ndarray,
    n_std: float = 2.0,
) -> Figure:
    """Draw the components in the plane over the data (Figure 1).

    Colour is the cluster; the shade darkens with pseudotime, the order of the components.

    Args:
        mean: (K, 2).
        covariance: (K, 2, 2).
        cluster: Cluster of each component, (K,); within one, components follow pseudotime.
        data: Points, (N, 2).
        n_std: Radius of the ellipses in standard deviations.

    Raises:
        ValueError: If shapes disagree or are not of the plane.
    """
    mean, covariance, cluster = np.asarray(mean), np.asarray(covariance), np.asarray(cluster)
    data = np.asarray(data)
    k = len(mean)
    shapes = (mean.shape, covariance.shape, cluster.shape, data.shape[1:])
    if shapes != ((k, 2), (k, 2, 2), (k,), (2,)):
        raise ValueError(
            "components are drawn in the plane: expected mean (K, 2), covariance (K, 2, 2), "
            f"cluster (K,) and data (N, 2), got {', '.join(map(str, shapes[:3]))} and {data.shape}"
        )
    variance, axes_of = np.linalg.eigh(covariance)  # (K, 2), (K, 2, 2), ascending
    variance = variance.clip(min=0)  # rounding makes the smaller one of a thin ellipse negative
    size = 2 * n_std * np.sqrt(variance)
    angle = np.degrees(np.arctan2(axes_of[:, 1, 0], axes_of[:, 0, 0]))
    colours = np.empty((k, 3))
    for c in np.unique(cluster):
        members = np.flatnonzero(cluster == c)
        for t, i in zip(_pseudotimes(len(members)), members, strict=True):
            colours[i] = _shade(_colour(c), t)
    figure, axes = _axes(WIDTH)
    _scatter(axes, data, None, size=4, colour="#c4c4c4")
    for alpha, width in ((0.12, 0.0), (1.0, 0.9)):  # faces below all outlines
        axes.add_collection(
            EllipseCollection(
                *size.T, angle, units="xy", offsets=mean, offset_transform=axes.transData,
                facecolors=colours if width == 0 else "none",
                edgecolors=colours if width else "none", linewidths=width, alpha=alpha,
            )
        )  # fmt: skip
    reach = n_std * np.sqrt(variance[:, 1:])
    _limit(axes, np.concatenate([data, mean - reach, mean + reach]), robust=False)
    axes.set(xlabel="feature 1", ylabel="feature 2")
    _key(figure, [(f"cluster {c}", _colour(c)) for c in np.unique(cluster)])
    return figure


def plot_history(history: pd.DataFrame, n_spaces: int) -> Figure:
    """Draw training and validation loss through the curriculum.

    Bands are the spaces; losses of different spaces are in units of those spaces and do not
    compare. The best validation loss is looked for where weights are chosen, while fine-tuning.
    Spikes far above the rest are cut off.

    Args:
        history: A row for each epoch with columns ``step``, ``space`` (V while fine-tuning),
            ``train`` and ``validation``, the last two in nats per dimension; NaN is left out.
        n_spaces: V.

    Raises:
        ValueError: If a column is missing or there are no rows.
    """
    missing = {"step", "space", "train", "validation"} - set(history.columns)
    if missing or history.empty:
        raise ValueError(
            f"history needs rows and the columns step, space, train and validation: got "
            f"{len(history)} rows, {', '.join(sorted(missing)) or 'none'} missing"
        )
    step = history["step"].to_numpy(float)
    space = history["space"].to_numpy(int)
    begin = np.concatenate([[0.0], step[:-1]])
    tuning = space >= n_spaces
    figure, axes = _axes(0.62 * WIDTH)
    for v in np.unique(space[~tuning])[::2]:
        inside = space == v
        axes.axvspan(begin[inside].min(), step[inside].max(), color="#ececec", lw=0, zorder=0)
    axes.plot(step, history["train"], color=PALETTE[0], lw=1.6, label="train")
    axes.plot(step, history["validation"], color=PALETTE[3], lw=1.6, ls="--", label="validation")

    def say(text: str, epochs: np.ndarray) -> None:
        middle = (begin[epochs].min() + step[epochs].max()) / 2
        over = axes.get_xaxis_transform()
        axes.text(middle, 1.02, text, transform=over, ha="center", fontsize=9)

    if (~tuning).any():
        say(f"{n_spaces} spaces: latent → input", ~tuning)
    if tuning.any():
        axes.axvline(begin[tuning].min(), color="#555555", lw=1, ls=":")
        say("fine-tuning", tuning)
        chosen = history["validation"].where(tuning)
        if chosen.notna().any():
            i = int(np.nanargmin(chosen.to_numpy(float)))
            label = f"best {chosen.iloc[i]:.3f} at step {step[i]:.0f}"
            star: dict[str, Any] = {
                "marker": "*",
                "ms": 13,
                "mfc": PALETTE[1],
                "mec": "black",
                "mew": 0.7,
            }
            axes.plot(step[i], chosen.iloc[i], ls="", **star, clip_on=False, label=label)
    loss = history[["train", "validation"]].to_numpy(float)
    loss = loss[np.isfinite(loss)]
    if loss.size:
        low, high = loss.min(), np.quantile(loss, 0.98)
        margin = 0.08 * (high - low) + 1e-3
        axes.set_ylim(low - margin, min(loss.max(), high + 0.2 * (high - low)) + margin)
    axes.set_xlim(0, step.max())
    axes.set(xlabel="step", ylabel="nats per dimension")
    axes.spines[["top", "right"]].set_visible(False)
    _legend(figure, 3)
    return figure


def plot_confusion(
    table: np.ndarray, class_names: Sequence[str], match: np.ndarray | None = None
) -> Figure:
    """Draw how each class spreads over the clusters.

    Clusters stand in the order of the classes they are matched with, those left over last; a frame
    marks each match. Shade is the share of the class, numbers are points.

    Args:
        table: Points by class and cluster, (n_classes, C).
        class_names: n_classes strings.
        match: Class of each cluster, (C,), -1 for none, as ``metrics.match_clusters`` returns it.

    Raises:
        ValueError: If shapes disagree.
    """
    table = np.asarray(table)
    match = np.full(table.shape[1:], -1) if match is None else np.asarray(match)
    if table.ndim != 2 or table.shape != (len(class_names), len(match)):
        raise ValueError(
            f"table must be (n_classes, C): got {table.shape} for {len(class_names)} classes and "
            f"{len(match)} matched clusters"
        )
    n_classes, n_clusters = table.shape
    order = np.argsort(np.where(match < 0, n_classes, match), kind="stable")
    share = table / np.maximum(table.sum(1, keepdims=True), 1)
    figure, axes = _axes(np.clip(0.76 * WIDTH * n_classes / n_clusters, 1.5, 2 * WIDTH) + 0.55)
    image = axes.imshow(share[:, order], cmap="Blues", vmin=0, vmax=1, interpolation="none")
    for column, c in enumerate(order):
        if match[c] >= 0:
            corner = (column - 0.5, match[c] - 0.5)
            frame: dict[str, Any] = {"fill": False, "ec": PALETTE[3], "lw": 1.8, "clip_on": False}
            axes.add_patch(Rectangle(corner, 1, 1, **frame))
        for row in range(n_classes if n_clusters <= 16 else 0):
            if table[row, c]:
                colour = "white" if share[row, c] > 0.55 else "black"
                text = str(table[row, c])
                size = 9 if n_clusters <= 10 and len(text) < 5 else 7
                axes.text(column, row, text, color=colour, fontsize=size, ha="center", va="center")
    size = 9 if n_clusters <= 16 else 6
    axes.set_xticks(range(n_clusters), [str(c) for c in order], fontsize=size)
    axes.set_yticks(
        range(n_classes), [_plain(drawable(name, 30)) for name in class_names], fontsize=9
    )
    axes.set(xlabel="cluster", ylabel="class")
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02)
    bar.set_ticks([0, 0.5, 1], labels=["0 %", "50 %", "100 %"], fontsize=9)
    bar.set_label("share of the class", fontsize=10)
    return choose_fonts(figure)


def plot_discretization(
    n_pseudotimes: Sequence[int], density: Sequence[float], unit: str
) -> Figure:
    """Draw density against the number of pseudotimes at which trajectories are extracted.

    Args:
        n_pseudotimes: Values of G.
        density: Negative log-density of test data at each, lower is better.
        unit: Unit of ``density``.

    Raises:
        ValueError: If the two differ in length, or are empty.
    """
    if len(n_pseudotimes) != len(density) or len(density) == 0:
        raise ValueError(
            f"need one density for each G: got {len(n_pseudotimes)} values of G and {len(density)}"
        )
    order = np.argsort(n_pseudotimes)
    g, y = np.asarray(n_pseudotimes)[order], np.asarray(density, float)[order]
    figure, axes = _axes(0.55 * WIDTH)
    axes.plot(g, y, color=PALETTE[0], marker="o", lw=1.6)
    for x, value in zip(g, y, strict=True):
        place: dict[str, Any] = {"textcoords": "offset points", "ha": "center"}
        axes.annotate(f"{value:.3f}", (x, value), (0, 8), **place, fontsize=9)
    axes.set_xscale("log")
    axes.set_xticks(g, [str(value) for value in g], fontsize=9)
    axes.xaxis.set_minor_locator(NullLocator())
    # At least 0.02 from top to bottom: differences in the last digit are not to look like effects.
    finite = y[np.isfinite(y)]
    if finite.size:
        middle = (finite.min() + finite.max()) / 2
        reach = max(0.8 * np.ptp(finite), 0.01)
        axes.set_ylim(middle - reach, middle + reach)
    axes.margins(x=0.1)
    axes.set(xlabel="pseudotimes of a trajectory, G", ylabel=unit)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


@dataclass(frozen=True)
class _Plane:
    """Two axes to look along: the features themselves, or two principal components.

    A single feature is seen along a line.
    """

    origin: np.ndarray
    axes: np.ndarray
    names: tuple[str, str]

    @classmethod
    def of(cls, x: np.ndarray) -> _Plane:
        n_features = x.shape[1]
        if n_features == 1:  # along a line
            return cls(np.zeros(1), np.eye(1, 2), ("feature 1", ""))
        if n_features == 2:
            return cls(np.zeros(2), np.eye(2), ("feature 1", "feature 2"))
        origin = x.mean(0)
        variance, vectors = np.linalg.eigh(np.cov(x - origin, rowvar=False))
        axes = vectors[:, [-1, -2]]
        axes = axes * np.sign(axes[np.abs(axes).argmax(0), [0, 1]])  # eigh leaves signs open
        part = variance[[-1, -2]] / max(variance.sum(), 1e-300)
        names = f"PC 1 ({100 * part[0]:.0f} %)", f"PC 2 ({100 * part[1]:.0f} %)"
        return cls(origin, axes, names)

    @property
    def n_features(self) -> int:
        return len(self.origin)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return (x - self.origin) @ self.axes  # (..., 2)


def _plot_paths(
    mean: np.ndarray, row_labels: list[str], idle: np.ndarray, data: np.ndarray | None
) -> Figure:
    plane = _Plane.of(mean.reshape(-1, mean.shape[2]) if data is None else np.asarray(data))
    paths = plane(mean)  # (C, G, 2)
    seen = [paths.reshape(-1, 2)]
    figure, axes = _axes(WIDTH)
    if data is not None:
        seen.append(plane(np.asarray(data)))
        _scatter(axes, seen[1], None, size=4, colour="#c4c4c4")
    for c, path in enumerate(paths):
        colours = [_shade(_colour(c), t) for t in _pseudotimes(len(path))]
        axes.plot(*path.T, color=_colour(c), lw=1.2, zorder=2)
        faces = ["white" if dim else to_hex(rgb) for dim, rgb in zip(idle[c], colours, strict=True)]
        axes.scatter(*path.T, s=26, c=faces, edgecolors=colours, linewidths=1.0, zorder=3)
        axes.scatter(*path[-1], s=52, marker="s", color=[colours[-1]], zorder=4)
    _limit(axes, np.concatenate(seen), robust=False)
    _name_axes(axes, plane)
    _key(figure, [(text, _colour(c)) for c, text in enumerate(row_labels)])
    return choose_fonts(figure)


def _figure(height: float) -> Figure:
    return Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained", facecolor="white")


def _axes(height: float) -> tuple[Figure, Axes]:
    figure = _figure(height)
    return figure, figure.add_subplot()


def _legend(figure: Figure, ncols: int, fontsize: int = 9, **options: Any) -> None:
    place: dict[str, Any] = {"loc": "outside lower center", "frameon": False}
    figure.legend(**place, ncols=ncols, fontsize=fontsize, **options)


def _colour(group: int) -> str:
    return GREY if group < 0 else PALETTE[int(group) % len(PALETTE)]


def _marker(group: int) -> str:
    return "x" if group < 0 else MARKERS[int(group) // len(PALETTE) % len(MARKERS)]


def _shade(colour: str, t: float) -> tuple[float, float, float]:
    """Lighten a colour at pseudotime 0, darken it at 1."""
    rgb = np.array(to_rgb(colour))
    rgb = rgb + (1 - rgb) * 0.7 * (1 - 2 * t) if t < 0.5 else rgb * (1 - 0.5 * (2 * t - 1))
    return float(rgb[0]), float(rgb[1]), float(rgb[2])


def _pseudotimes(n: int) -> np.ndarray:
    return np.linspace(0, 1, n) if n > 1 else np.full(n, 0.5)


def _thin(n: int, n_most: int) -> np.ndarray:
    """Choose evenly among n things, both ends included."""
    return np.linspace(0, n - 1, min(n, n_most)).round().astype(int)


def _plain(text: object) -> str:
    """Keep a name from being read as mathematics."""
    return str(text).replace("$", r"\$")


def _name_position(v: float) -> str:
    end = {0.0: " (input)", 1.0: " (latent)"}.get(round(float(v), 6), "")
    return f"v = {float(v):.3g}{end}"


def _check_group(name: str, group: np.ndarray | None, n: int) -> None:
    if group is not None and np.shape(group) != (n,):
        raise ValueError(f"{name} must be ({n},), one for each point: got {np.shape(group)}")


def _scatter(
    axes: Axes, x: np.ndarray, group: np.ndarray | None, size: float, colour: str = PALETTE[0]
) -> None:
    keep = _thin(len(x), N_POINTS)
    x = x[keep]
    size = size * np.clip(np.sqrt(1000 / max(len(x), 1)), 1, 3)  # few points may be larger
    if group is None:
        axes.scatter(*x.T, s=size, color=colour, linewidths=0, rasterized=True)
        return
    group = np.asarray(group)[keep]
    for g in np.unique(group):
        own, width = (3 * size, 0.6) if g < 0 else (size, 0)  # a cross is all outline
        style: dict[str, Any] = {"color": _colour(g), "marker": _marker(g), "linewidths": width}
        axes.scatter(*x[group == g].T, s=own, **style, rasterized=True)


def _limit(axes: Axes, x: np.ndarray, robust: bool = True) -> None:
    """Set equal scales that show all points, or all but the outermost 0.2 % along each axis."""
    low, high = np.quantile(x, [0.001, 0.999] if robust else [0, 1], axis=0)
    middle, reach = (low + high) / 2, 0.54 * max((high - low).max(), 1e-9)
    (left, bottom), (right, top) = middle - reach, middle + reach
    axes.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")


def _name_axes(axes: Axes, plane: _Plane) -> None:
    axes.set(xlabel=plane.names[0], ylabel=plane.names[1])
    axes.tick_params(labelsize=9)


def _key(figure: Figure, groups: list[tuple[str, str]]) -> None:
    """Explain colours, (text, colour), if they are few, and the shades of pseudotime."""

    def entry(text: str, colour: str | tuple[float, float, float]) -> Line2D:
        return Line2D([], [], color=colour, label=text, ls="", marker="o", ms=7)

    blank = Line2D([], [], ls="", label=" ")
    shown = groups if len(groups) <= N_LEGEND else []
    entries = [entry(_plain(text), colour) for text, colour in shown]
    times = [entry(f"t = {t:g}", _shade("#808080", t)) for t in (0.0, 0.5, 1.0)]
    column = 0.55 + 0.075 * max((len(text) for text, _ in shown), default=0)  # inches, about
    most = int(np.clip((WIDTH - 0.9) // column, 1, 3))  # columns of clusters
    n_rows = max(len(times), -(-len(entries) // most))
    entries += [blank] * (-len(entries) % n_rows) + times  # pseudotimes get a column of their own
    n_columns = -(-len(entries) // n_rows)
    entries += [blank] * (n_columns * n_rows - len(entries))
    figure.set_figheight(0.95 * WIDTH + 0.19 * n_rows)
    _legend(figure, n_columns, handles=entries)


def _examples(label: np.ndarray | None, n: int, n_images: int) -> np.ndarray:
    """Choose points of as many classes as possible, in the order of the classes, (n_images,)."""
    if label is None:
        return np.arange(min(n, n_images))
    label = np.asarray(label)
    turn = np.zeros(n, int)  # how many of its class come before a point
    for g in np.unique(label):
        turn[label == g] = np.arange((label == g).sum())
    chosen = np.lexsort((np.arange(n), label, turn))[:n_images]
    return chosen[np.lexsort((chosen, label[chosen]))]


def _grid(x: np.ndarray, group: np.ndarray | None, n_columns: int, n_rows: int) -> np.ndarray:
    """Lay points out by group, or in their order, NaN where there are none, (rows, columns, M)."""
    if group is None:
        parts = [x[i * n_columns : (i + 1) * n_columns] for i in range(n_rows)]
    else:
        group = np.asarray(group)
        parts = [x[group == g][:n_columns] for g in np.unique(group)[:20]]
    grid = np.full((len(parts), n_columns, x.shape[1]), np.nan)
    for row, part in zip(grid, parts, strict=True):
        row[: len(part)] = part
    return grid


def _grey(x: np.ndarray, low: np.ndarray | float, high: np.ndarray | float) -> np.ndarray:
    return np.clip((x - low) / np.maximum(high - low, 1e-12), 0, 1)


def _gap(width: int) -> int:
    return max(1, width // 12)


def _aspect(image_shape: tuple[int, int, int]) -> float:
    return image_shape[1] / image_shape[2]


def _draw_mosaic(
    axes: Axes, images: np.ndarray, image_shape: tuple[int, int, int], row_gap: float = 0
) -> np.ndarray:
    """Draw a grid of images, (rows, columns, M) in [0, 1], NaN for none, one pixel a unit.

    The first three channels are red, green and blue; of two, blue stays dark.

    Returns:
        Vertical centre of each row, (rows,).
    """
    channels, height, width = image_shape
    if images.shape[2] != channels * height * width:
        raise ValueError(
            f"image_shape must be (channels, height, width) for {images.shape[2]} features: got "
            f"{tuple(image_shape)}"
        )
    gap = _gap(width)
    row_gap = max(row_gap, gap)
    n_rows, n_columns = images.shape[:2]
    images = images.reshape(n_rows, n_columns, channels, height, width)
    if channels == 2:
        dark = np.where(np.isnan(images[:, :, :1]), np.nan, 0.0)
        images = np.concatenate([images, dark], axis=2)
    images = images[:, :, :3]
    images = np.nan_to_num(np.broadcast_to(images, (n_rows, n_columns, 3, height, width)), nan=1.0)
    for i, row in enumerate(images):
        strip = np.ones((height, n_columns * (width + gap) - gap, 3))
        for j, image in enumerate(row):
            left = j * (width + gap)
            strip[:, left : left + width] = image.transpose(1, 2, 0)
        top = i * (height + row_gap) - 0.5
        extent = (-0.5, strip.shape[1] - 0.5, top + height, top)
        axes.imshow(strip, extent=extent, interpolation="none")
    axes.set_xlim(-0.5, strip.shape[1] - 0.5)
    axes.set_ylim(top + height, -0.5)
    axes.spines[:].set_visible(False)
    axes.set(xticks=[], yticks=[])
    axes.tick_params(length=0)
    return np.arange(n_rows) * (height + row_gap) + height / 2 - 0.5


def plot_sweep(
    labels: Sequence[str], row: np.ndarray, panels: dict[str, np.ndarray], n_failed: Sequence[int]
) -> Figure:
    """Draw the trials of a sweep as strokes, each row's mean and standard deviation as an interval.

    Args:
        labels: Names of the rows, from the top.
        row: Index of each trial's row, (N,).
        panels: A score of each trial by its title, (N,), NaN for a trial without one.
        n_failed: Trials of each row that failed; said beside the row.

    Raises:
        ValueError: If lengths disagree.
    """
    row = np.asarray(row)
    for title, values in panels.items():
        if len(values) != len(row):
            raise ValueError(f"{title}: expected {len(row)} values, got {len(values)}")
    if len(n_failed) != len(labels):
        raise ValueError(f"expected {len(labels)} counts of failures, got {len(n_failed)}")
    figure = _figure(0.9 + 0.24 * len(labels))
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for panel, (ax, (title, values)) in enumerate(zip(axes, panels.items(), strict=True)):
        for index in range(len(labels)):
            own = values[(row == index) & np.isfinite(values)]
            if len(own):
                spread = own.std(ddof=1) if len(own) > 1 else 0.0
                style: dict[str, Any] = {
                    "fmt": "o",
                    "color": PALETTE[panel],
                    "capsize": 3,
                    "markersize": 5,
                }
                ax.errorbar(own.mean(), index, xerr=spread, **style, zorder=3)
                ax.plot(own, np.full(len(own), index), "|", color=GREY, markersize=9, zorder=2)
        ax.set_xlabel(textwrap.fill(title, 22 if len(panels) > 1 else 40), fontsize=8)
        ax.tick_params(labelsize=7)
        ax.grid(axis="y", color="#e6e6e6", linewidth=0.6)
        ax.set_axisbelow(True)
    names = [
        textwrap.fill(drawable(label, 120), 60)
        + (f"\n({failed} of {int((row == index).sum())} failed)" if failed else "")
        for index, (label, failed) in enumerate(zip(labels, n_failed, strict=True))
    ]
    axes[0].set_yticks(range(len(labels)), names, fontsize=7, parse_math=False)
    axes[0].set_ylim(len(labels) - 0.4, -0.6)
    return choose_fonts(figure)


def plot_costs(
    labels: Sequence[str],
    group: Sequence[str],
    density: np.ndarray,
    spread: np.ndarray,
    costs: dict[str, np.ndarray],
    unit: str,
) -> Figure:
    """Draw the density of models against what they cost, a panel a cost, on logarithmic scales.

    A model without a density, or without a positive cost, is left out of the panel.

    Args:
        labels: Names of the models, K strings, written beside the points.
        group: Kind of each model, K strings; a key explains their colours and markers.
        density: Negative log-density of test data, lower is better, (K,).
        spread: Standard deviation of each, drawn as a bar, NaN for none, (K,).
        costs: Costs of each by the title of the panel, (K,), NaN for one that is not known.
        unit: Unit of ``density``.

    Raises:
        ValueError: If lengths disagree, or there is no panel.
    """
    density, spread = np.asarray(density, float), np.asarray(spread, float)
    columns = {"group": group, "density": density, "spread": spread, **costs}
    for title, values in columns.items():
        if len(values) != len(labels):
            raise ValueError(f"{title}: expected {len(labels)} values, got {len(values)}")
    labels = [drawable(label) for label in labels]
    if not costs:
        raise ValueError("costs has no panel: expected the values of one cost or more")
    kinds = list(dict.fromkeys(group))
    kind = np.array([kinds.index(name) for name in group], int)
    figure = _figure(0.5 + 3.5 * len(costs))
    panels = figure.subplots(len(costs), 1, sharey=True, squeeze=False)[:, 0]
    drawn = []
    for axes, (title, values) in zip(panels, costs.items(), strict=True):
        x = np.asarray(values, float)
        shown = np.flatnonzero(np.isfinite(density) & np.isfinite(x) & (x > 0))
        _draw_costs(axes, x[shown], density[shown], spread[shown], kind[shown])
        axes.set_xlabel(title, fontsize=9)
        axes.set_ylabel(unit, fontsize=9)
        drawn.append((axes, x, shown))
    # Darker than the points, so that the lighter colours can be read.
    ink = [to_hex(_shade(PALETTE[i % len(PALETTE)], 0.8)) for i in kind]
    handles = []
    for i, name in enumerate(kinds):
        style: dict[str, Any] = {
            "marker": MARKERS[i % len(MARKERS)],
            "color": PALETTE[i % len(PALETTE)],
            "ms": 5,
        }
        handles.append(Line2D([], [], ls="", **style, label=_plain(drawable(name))))
    if handles:
        _legend(figure, 3, fontsize=8, handles=handles)
    figure.draw_without_rendering()  # lays the panels out, whose sizes the labels need
    for axes, x, shown in drawn:
        bars = np.nan_to_num(spread[shown])
        texts = [(labels[k], ink[k]) for k in shown]
        _label_points(axes, texts, x[shown], density[shown], bars)
    return choose_fonts(figure)


def _draw_costs(
    axes: Axes, x: np.ndarray, density: np.ndarray, spread: np.ndarray, kind: np.ndarray
) -> None:
    """Draw the points of one panel of :func:`plot_costs`, a bar through each; no labels yet."""
    for k, i in enumerate(kind):
        colour, marker = PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]
        axes.errorbar(
            x[k], density[k], yerr=np.nan_to_num(spread[k]), color=colour, marker=marker, ms=6,
            mec="white", mew=0.6, lw=1, zorder=3,
        )  # fmt: skip
    if len(x):
        axes.set_xscale("log")
    else:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", fontsize=9)
        axes.set_xticks([])
    axes.margins(x=0.15, y=0.15)
    axes.tick_params(labelsize=8)
    axes.grid(color="#eeeeee", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _label_points(
    axes: Axes, labels: Sequence[tuple[str, str]], x: np.ndarray, y: np.ndarray, bar: np.ndarray
) -> None:
    """Write labels, (text, colour), beside their points, where they cover the least.

    Each label in turn takes the best of many places around its point, given those of the others,
    in a few rounds: no chance is in it. One that had to move away gets a line to its point.
    """
    if not len(labels):
        return
    size, reach = 7, 3.5  # points, as are all lengths below; of the type and half of a marker
    scale = 72 / axes.figure.dpi
    frame = np.array(axes.get_window_extent().extents) * scale
    low, middle, high = (
        axes.transData.transform(np.column_stack([x, y + sign * bar])) * scale
        for sign in (-1, 0, 1)
    )
    marks = np.concatenate([low - reach, high + reach], 1)  # (K, 4): left, bottom, right, top
    width = [TextPath((0, 0), _plain(text), size=size).get_extents().width for text, _ in labels]
    half = np.column_stack([width, np.full(len(labels), 0.95 * size)]) / 2 + 0.8
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    around = np.column_stack([np.cos(angle), np.sin(angle)])
    radius = np.array([5.5, 9, 13, 19, 26, 34, 43, 53, 64, 78])
    steps = (radius[:, None, None] * around).reshape(-1, 2)  # (J, 2)
    away = np.repeat(radius, len(angle))
    aside = np.tile(np.clip(1.5 * around, -1, 1), (len(radius), 1))
    centre = middle.copy()
    boxes = np.zeros((len(labels), 4))  # of no area: nobody has a place before the first round
    for _ in range(4):
        for k in range(len(labels)):
            places = middle[k] + steps + aside * half[k]
            candidates = np.concatenate([places - half[k], places + half[k]], 1)
            others = np.delete(boxes, k, 0)
            covered = _overlap(candidates, others).sum(1) + _overlap(candidates, marks).sum(1)
            outside = 4 * half[k].prod() - _overlap(candidates, frame[None])[:, 0]
            line = np.linspace(0, 1, 12)[:, None, None]
            line = (1 - line) * (middle[k] + reach * np.sign(steps)) + line * places
            line = np.concatenate([line - 0.5, line + 0.5], 2)
            crossed = sum(_overlap(part, others).sum(1) for part in line)
            best = np.argmin(covered + 20 * outside + 3 * crossed + 1.2 * away)
            centre[k], boxes[k] = places[best], candidates[best]
    for k, (text, colour) in enumerate(labels):
        gap = np.maximum(np.abs(centre[k] - middle[k]) - half[k], 0)
        far = np.hypot(*gap) > 6
        note = axes.annotate(
            text, (x[k], y[k]), centre[k] - middle[k], textcoords="offset points", ha="center",
            va="center", fontsize=size, color=colour, parse_math=False, zorder=4,
            arrowprops={"arrowstyle": "-", "lw": 0.5, "color": GREY, "shrinkA": 0, "shrinkB": 3}
            if far else None,
        )  # fmt: skip
        note.set_in_layout(False)


def _overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Areas that boxes (J, 4) share with boxes (B, 4): left, bottom, right, top; (J, B)."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    return np.clip(high - low, 0, None).prod(2)
