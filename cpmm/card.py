"""What a fitted mixture is, in values and as a model card (Markdown)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cpmm import __version__
from cpmm.fitted import FittedMixture

MOST = 20  # features and clusters that a card names

USE = """```python
import torch
from cpmm.fitted import FittedMixture

fitted = FittedMixture.load("this folder")  # pip install cpmm
log_density = fitted.log_prob(  # nats, (N,)
    torch.as_tensor(points), torch.Generator().manual_seed(0)
)
```"""


def describe(fitted: FittedMixture) -> dict[str, Any]:
    """Sizes, data and origin of a mixture."""
    fa, header = fitted.mixture.components, fitted.header
    pre, sizes = fitted.preprocessing, fitted.mixture.cluster_sizes
    data = "a table of real values"
    if pre.levels is not None:
        channels, height, width = fitted.image_shape or (1, 1, fa.n_features)
        size = f"{channels} channels of " * (channels > 1) + f"{height} x {width}"
        data = f"images of {size}, {pre.levels} grey levels, logit with margin {pre.alpha:g}"
    return {
        "preset": header.get("preset"),
        "components": fa.n_components,
        "clusters": fitted.mixture.n_clusters,
        "components of a cluster": sizes[0] if len(set(sizes)) == 1 else list(sizes),
        "features": fa.n_features,
        "factors": fa.n_factors,
        "parameters": fa.n_parameters,
        "data": data,
        "unit": fitted.unit,
        "fingerprint": header.get("fingerprint"),
        "schema": header.get("schema"),
        "version": header.get("version", __version__),
        "sha256": header.get("files", {}).get("mixture.safetensors"),
    }


def model_card(
    fitted: FittedMixture,
    scores: Sequence[Mapping[str, Any]] = (),
    rules: Sequence[str] = (),
) -> str:
    """Write a card for people: data, sizes, figures and their rules, clusters, how to use it.

    Args:
        fitted: The mixture.
        scores: Rows of a table of figures, the same keys in each.
        rules: How the figures were made, a sentence each.

    Returns:
        Markdown.
    """
    mixture, names = fitted.mixture, fitted.feature_names
    said = {name: value for name, value in describe(fitted).items() if value is not None}
    estimator = fitted.header.get("estimator", {})
    said |= {"estimator": estimator["class"]} if estimator else {}
    named = ", ".join(map(_escape, names[:MOST])) + ", and more" * (len(names) > MOST)
    weight = mixture.components.log_weight.softmax(0)
    share = [float(part.sum()) for part in weight.split(mixture.cluster_sizes)]
    clusters = [
        {"cluster": c, "weight": f"{share[c]:.3f}", "components": mixture.cluster_sizes[c]}
        for c in sorted(range(len(share)), key=lambda c: -share[c])[:MOST]
    ]
    parts = [
        f"# Mixture of factor analyzers: {_escape(said.get('preset') or said['data'])}",
        _table([{"": name, " ": value} for name, value in said.items()]),
        f"Features: {named}.",
        f"Points are modelled as {fitted.preprocessing.description}; densities are in the units "
        "of the data.",
    ]
    if scores:
        parts += ["## Figures", _table(scores)]
    parts += [*rules]
    parts += [f"## Clusters{' (the largest)' * (len(share) > MOST)}", _table(clusters)]
    if estimator:
        options = [f"`{name}={value!r}`" for name, value in estimator["parameters"].items()]
        parts += ["## How it was fitted", f"{estimator['class']} with {', '.join(options)}."]
    return "\n\n".join([*parts, "## Use", USE]) + "\n"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(map(_escape, line))} |" for line in lines)


def _escape(value: Any) -> str:
    """Text that stays text in Markdown."""
    text = " ".join(str(value).split()).replace("\\", "\\\\").replace("|", "\\|")
    return text.replace("<", "&lt;").replace("`", "'")
