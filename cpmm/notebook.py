"""How a mixture shows itself in a notebook: a small table as HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from cpmm.clusters import clusters_of, standardized, telling

if TYPE_CHECKING:
    from cpmm.fitted import FittedMixture

N_CLUSTERS = 8  # shown
N_FEATURES = 6
LONGEST = 40  # letters of a column's name


def mixture_html(fitted: FittedMixture, facts: Mapping[str, object] | None = None) -> str:
    """Describe a mixture and its heaviest clusters.

    Args:
        fitted: On any device.
        facts: What else is known, such as rows and log-likelihood, by name; shown first.
    """
    fa, sizes = fitted.mixture.components, fitted.mixture.cluster_sizes
    shown: dict[str, object] = dict(facts or {})
    if fitted.image_shape is None:
        shown["columns"] = fitted.n_features
    else:
        shown["images"] = " x ".join(map(str, fitted.image_shape))
    shown["clusters"] = sum(size > 0 for size in sizes)
    if fa.n_components != shown["clusters"]:
        shown["components"] = fa.n_components
    shown["factors"] = fa.n_factors
    said = " · ".join(
        f"{escape(name)} <b>{escape(str(value))}</b>" for name, value in shown.items()
    )
    return f"<div><p>{said}</p>{_clusters_table(fitted)}</div>"


def _clusters_table(fitted: FittedMixture) -> str:
    clusters = clusters_of(fitted)
    heaviest, features = clusters[:N_CLUSTERS], _features(fitted)
    names = [fitted.feature_names[m] for m in features]
    rows = [
        [str(cluster.index), f"{100 * cluster.weight:.1f} %"]
        + ([f"{float(v):.4g}" for v in cluster.mean()[features]] if features else [])
        for cluster in heaviest
    ]
    left = [
        f"{len(clusters) - len(heaviest)} lighter clusters" * (len(clusters) > len(heaviest)),
        f"{fitted.n_features - len(features)} more columns, which differ less"
        * bool(features and fitted.n_features > len(features)),
    ]
    said = ", ".join(text for text in left if text)
    heads = ["cluster", "weight", *(f"mean of {_short(name)}" for name in names)]
    note = f"<p><small>and {said}</small></p>" if said else ""
    return f"<table><thead>{_row('th', heads)}</thead><tbody>{_rows(rows)}</tbody></table>{note}"


def _features(fitted: FittedMixture) -> list[int]:
    """Columns whose means are worth showing: those that differ most, none of images."""
    if fitted.image_shape is not None:
        return []
    try:
        clusters, mean, _ = standardized(fitted)
    except ValueError:  # whitened: there is no order among them
        return list(range(min(N_FEATURES, fitted.n_features)))
    return telling(clusters, mean, N_FEATURES)


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def _rows(rows: Sequence[Sequence[str]]) -> str:
    return "".join(_row("td", row) for row in rows)


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"
