"""ONNX files give what the mixture gives, without torch; model cards say what it is."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from cpmm.card import describe, model_card
from cpmm.elementwise import ElementwiseMap
from cpmm.factor_analyzers import FactorAnalyzers
from cpmm.fitted import FittedMixture
from cpmm.mixture import Mixture
from cpmm.preprocessing import Preprocessing

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
from cpmm.export import to_onnx  # noqa: E402

N, M, K, R = 40, 5, 4, 2
MAP = ElementwiseMap((-9.0, 0.0, 9.0), (-4.0, 0.5, 3.0), (-1.0, 0.3, -2.0))


def fitted(preprocessing: Preprocessing) -> FittedMixture:
    g = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=g, dtype=torch.float64)

    fa = FactorAnalyzers(normal(K).log_softmax(0), normal(K, M), normal(K, M, R), normal(K, M) - 4)
    names = tuple(f"x|{m}" for m in range(M))
    return FittedMixture(Mixture(fa, (1, 3)), preprocessing, None, names, {})


TABLE = Preprocessing(None, None, (1.0, 2.0, -3.0, 0.0, 5.0), (1.0, 2.0, 30.0, 0.1, 1.0))
GREY = replace(TABLE, levels=17, alpha=0.01)
WHITE = replace(TABLE, whitening=torch.eye(M, dtype=torch.float64) * 2 + 0.1)


def points(preprocessing: Preprocessing, gaps: bool) -> np.ndarray:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(N, M)) * preprocessing.scale + preprocessing.shift
    if preprocessing.levels is not None:
        x = rng.integers(0, preprocessing.levels, (N, M)).astype(float)
    if gaps:
        x[rng.random(x.shape) < 0.3] = np.nan
        x[3] = np.nan
    return x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("preprocessing", "gaps"),
    [
        (TABLE, True),
        (TABLE, False),
        (WHITE, False),
        (GREY, False),
        (GREY, True),
        (replace(GREY, map=MAP), True),
    ],
    ids=["table", "whole", "whitened", "grey", "grey with gaps", "map"],
)
def test_onnx_gives_what_the_mixture_gives(preprocessing, gaps, dtype, tmp_path):
    model, path = fitted(preprocessing), tmp_path / "m.onnx"
    x = points(preprocessing, gaps).astype(str(dtype).removeprefix("torch."))
    names = to_onnx(model, path, dtype, missing=gaps)
    session = onnxruntime.InferenceSession(path)
    got = dict(zip(names, session.run(None, {"points": x}), strict=True))
    assert len(session.run(None, {"points": x[:1]})[0]) == 1  # any number of points

    pre, mixture = model.preprocessing, model.mixture.allow_missing()
    raw = torch.from_numpy(x).double()
    z, log_det = pre.forward(pre.dequantize(raw, None))
    levels = (~raw.isnan()).sum(1) * math.log(pre.levels or 1)
    expected = (mixture.log_prob(z) + log_det - levels).numpy()
    assert np.allclose(got["log_density"], expected, rtol=1e-5, atol=1e-5)
    posterior = mixture.cluster_responsibilities(z).numpy()
    assert np.allclose(got["cluster_posterior"], posterior, atol=1e-5)
    assert ("imputed" in got) == (gaps and pre.is_affine)
    if "imputed" in got:
        filled = model.impute(raw, torch.Generator()).numpy()
        assert np.allclose(got["imputed"], filled, rtol=1e-5)
        assert np.array_equal(got["imputed"][~np.isnan(x)], x[~np.isnan(x)])


def test_what_cannot_be_exported_is_named_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match="whitening"):
        to_onnx(fitted(WHITE), tmp_path / "m.onnx", missing=True)
    with pytest.raises(ValueError, match=r"expected torch\.float32 or torch\.float64"):
        to_onnx(fitted(TABLE), tmp_path / "m.onnx", torch.float16)
    with pytest.raises(OSError, match="nowhere"):
        to_onnx(fitted(TABLE), tmp_path / "nowhere" / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_a_card_states_sizes_figures_and_clusters_and_stays_a_table():
    model = fitted(TABLE)
    card = model_card(model, [{"model": "a|b", "density": "1.25"}], ["Ten test points."])
    assert describe(model)["components"] == K
    assert describe(model)["components of a cluster"] == [1, 3]
    for part in ("| components | 4 |", "| a\\|b | 1.25 |", "Ten test points.", "x\\|0"):
        assert part in card
    weight = model.mixture.components.log_weight.exp()
    assert f"| 0 | {float(weight[0]):.3f} | 1 |" in card
