"""A fitted mixture as one ONNX file: densities, clusters and imputation without torch.

The file holds the preprocessing, too: it takes points as they come.
"""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from cpmm import __version__
from cpmm.elementwise import spline
from cpmm.factor_analyzers import prepare_density
from cpmm.files import replace_file
from cpmm.fitted import FittedMixture

OPSET = 18
INPUT = "points"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's exporter from speaking of itself, and of torchvision."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


class _Exported(nn.Module):
    """What :func:`to_onnx` writes, in operations that ONNX has."""

    def __init__(self, fitted: FittedMixture, dtype: torch.dtype, missing: bool) -> None:
        super().__init__()
        self.mixture, self.missing = fitted.mixture.to("cpu", torch.float64), missing
        self.preprocessing, self.dtype = fitted.preprocessing, dtype
        self.density = prepare_density(self.mixture.components)
        if (whitening := fitted.preprocessing.whitening) is not None:
            self.log_whitening = float(torch.linalg.slogdet(whitening).logabsdet)

    def forward(self, points: Tensor) -> tuple[Tensor, ...]:
        """Map points, (N, M), to log-density (N,), posterior (N, C) and, with gaps, points."""
        seen = ~points.isnan() if self.missing else torch.ones_like(points, dtype=torch.bool)
        z, log_det = self._transform(torch.where(seen, points, 0.0).double(), seen)
        if not self.missing:
            joint = self.density.component_log_prob(z) + self.mixture.components.log_weight
            found = [joint.logsumexp(1) + log_det, self._posterior(joint)]
        else:
            joint, factors = self._observe(z, seen.to(z))
            found = [joint.logsumexp(1) + log_det, self._posterior(joint)]
            if self.preprocessing.is_affine:
                found.append(torch.where(seen, points, self._mean(joint, factors)))
        return tuple(result.to(self.dtype) for result in found)

    def _transform(self, x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Points in the mixture's space, and the log-determinant of the way there, (N,)."""
        pre = self.preprocessing
        slope = (-x.new_tensor(pre.scale).log()).expand_as(x)
        if pre.levels is not None:
            assert pre.alpha is not None  # grey levels have a margin
            s = pre.alpha + (1 - 2 * pre.alpha) * (x + 0.5) / pre.levels
            slope = slope + math.log1p(-2 * pre.alpha) - s.log() - torch.log1p(-s)
            slope = slope - math.log(pre.levels)
            x = s.log() - torch.log1p(-s)
        if pre.map is not None:
            tensors = (pre.map.knot, pre.map.value, pre.map.log_slope)
            x, steepness = spline(x, *map(x.new_tensor, tensors))
            slope = slope + steepness
        log_det = torch.where(seen, slope, 0.0).sum(1)
        z = (x - x.new_tensor(pre.shift)) / x.new_tensor(pre.scale)
        if pre.whitening is not None:
            z = z @ pre.whitening.to(z)
            log_det = log_det + self.log_whitening
        return z, log_det

    def _observe(self, z: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Log of weight times density of what is seen, (N, K), and mean factors, (N, K, R).

        As :func:`cpmm.conditioning.factor_posterior`; ONNX has no Cholesky factors, so that the
        capacitance matrices, C factors = b, are solved by elimination.
        """
        fa = self.mixture.components
        centre = fa.mean.mean(0)
        mean, precision = fa.mean - centre, (-fa.log_diagonal).exp()
        deviation = (z - centre) * seen
        scaled = (fa.loading * precision.unsqueeze(2)).mT  # (K, R, M)
        k, r, m = scaled.shape
        pairs = (fa.loading.mT.unsqueeze(1) * scaled.unsqueeze(2)).reshape(k * r * r, m)
        capacitance = (seen @ pairs.T).reshape(-1, k, r, r) + torch.eye(r).to(z)
        b = deviation @ scaled.reshape(k * r, m).T
        b = (b - seen @ (scaled * mean.unsqueeze(1)).reshape(k * r, m).T).reshape(-1, k, r)
        log_det = seen @ (fa.log_diagonal + math.log(2 * math.pi)).T
        rows = torch.cat([capacitance, b.unsqueeze(3)], 3)  # (N, K, R, R + 1)
        for i in range(r):
            row = rows[:, :, i : i + 1] / rows[:, :, i : i + 1, i : i + 1]
            log_det = log_det + rows[:, :, i, i].log()
            this = (torch.arange(r) == i).unsqueeze(1)
            rows = torch.where(this, row, rows - rows[:, :, :, i : i + 1] * row)
        factors = rows[:, :, :, r]
        distance = (
            deviation.square() @ precision.T
            - 2 * deviation @ (mean * precision).T
            + seen @ (mean.square() * precision).T
            - (b * factors).sum(2)
        )
        return fa.log_weight - 0.5 * (distance + log_det), factors

    def _posterior(self, joint: Tensor) -> Tensor:
        parts = joint.softmax(1).split(self.mixture.cluster_sizes, 1)
        return torch.cat([part.sum(1, keepdim=True) for part in parts], 1)

    def _mean(self, joint: Tensor, factors: Tensor) -> Tensor:
        """Mean of the M features given what is seen, in the data's units, (N, M)."""
        fa, pre, share = self.mixture.components, self.preprocessing, joint.softmax(1)
        loading = fa.loading.mT.reshape(-1, fa.n_features)  # (K R, M)
        z = share @ fa.mean + (share.unsqueeze(2) * factors).flatten(1) @ loading
        return z * z.new_tensor(pre.scale) + z.new_tensor(pre.shift)


def to_onnx(
    fitted: FittedMixture,
    path: str | Path,
    dtype: torch.dtype = torch.float64,
    missing: bool | None = None,
) -> list[str]:
    """Write a mixture as an ONNX file (opset 18) that needs neither torch nor this package.

    Its input ``points``, (N, M), are data as they come; its outputs are ``log_density``, nats in
    units of the data, (N,), as :meth:`FittedMixture.log_prob`; ``cluster_posterior``, (N, C); and,
    where gaps are taken and means go through the preprocessing, ``imputed``, (N, M): the points,
    their NaN filled with the mean given the rest. A grey level stands for the middle of its cell,
    without the noise that :meth:`FittedMixture.log_prob` draws.

    Args:
        fitted: The mixture; ``model.mixture_`` of an estimator.
        path: Written in one step.
        dtype: Of points and results, float64 or float32; it computes in float64.
        missing: Whether NaN in a point is a gap, which takes N K R^2 numbers; None: for tables.

    Returns:
        Names of the outputs.

    Raises:
        ModuleNotFoundError: If the extra ``onnx`` is not installed.
        ValueError: If the type is another, or gaps are asked for behind a whitening.
        OSError: If the file cannot be written.
    """
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype is {dtype}: expected torch.float32 or torch.float64")
    if missing is None:
        missing = fitted.preprocessing.levels is None and fitted.preprocessing.whitening is None
    if missing:
        fitted.preprocessing.require_elementwise()
    import onnx
    import onnxscript  # noqa: F401 - which torch needs

    module = _Exported(fitted, dtype, missing).eval()
    outputs = ["log_density", "cluster_posterior"]
    outputs += ["imputed"] if missing and fitted.preprocessing.is_affine else []
    some = torch.zeros(3, fitted.n_features, dtype=dtype)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module, (some,), dynamo=True, opset_version=OPSET, verbose=False,
            input_names=[INPUT], output_names=outputs,
            dynamic_shapes=({0: torch.export.Dim("n")},),
        )  # fmt: skip
    assert program is not None  # what torch returns with dynamo=True
    model = program.model_proto
    described = {
        "cpmm": __version__, "unit": "nats", "features": json.dumps(fitted.feature_names),
        "missing": json.dumps(missing),
    }  # fmt: skip
    onnx.helper.set_model_props(model, described)
    onnx.checker.check_model(model)
    replace_file(Path(path), lambda temporary: onnx.save(model, temporary))
    return outputs
