"""The prepared data with a learned elementwise map."""

import json

import pytest
import torch

from cpmm.factor_analyzers import FactorAnalyzers
from cpmm.fitted import FittedMixture
from cpmm.mixture import Mixture
from cpmm.pipeline.artifacts.store import load_prepared, save_prepared

SPLINE = [
    "data.map.kind=spline", "data.map.n_bins=6", "data.map.n_steps=25", "data.map.n_components=3",
    "data.map.n_factors=2",
]  # fmt: skip


def test_a_learned_map_is_kept_with_the_data(make_folder, run_stage, tmp_path):
    folder = make_folder("digits", *SPLINE)
    status, printed, errors = run_stage("prepare_data", folder)
    assert status == 0, errors
    assert "prepare_data | step 25/25 | elementwise map | " in printed
    data = load_prepared(folder / "prepared")
    assert data.preprocessing.map.n_bins == 6
    save_prepared(tmp_path / "again", data, "fingerprint")
    assert load_prepared(tmp_path / "again").preprocessing == data.preprocessing
    z, log_det = data.points("train")
    assert float(z.mean(0).abs().max()) < 0.1
    # Grey levels come back, in the package as in the artifact of a mixture.
    x = data.preprocessing.inverse(z)
    assert torch.equal((x * 17).floor(), data.raw["train"].double())
    assert bool(torch.isfinite(log_det).all())
    again = make_folder("digits", *SPLINE, name="again")
    assert run_stage("prepare_data", again)[0] == 0
    assert load_prepared(again / "prepared").preprocessing == data.preprocessing


def test_a_fitted_mixture_goes_through_the_map(make_folder, run_stage, tmp_path, generator):
    folder = make_folder("digits", *SPLINE, "data.n_train=200")
    assert run_stage("prepare_data", folder)[0] == 0
    data = load_prepared(folder / "prepared")
    m = data.n_features
    fa = FactorAnalyzers(torch.zeros(1), torch.zeros(1, m), torch.zeros(1, m, 1), torch.zeros(1, m))
    header = {
        "preprocessing": data.preprocessing.to_dict(),
        "image_shape": data.image_shape,
        "feature_names": data.feature_names,
    }
    Mixture(fa, (1,)).save(tmp_path / "mixture", json.loads(json.dumps(header)))
    fitted = FittedMixture.load(tmp_path / "mixture")
    raw, _ = fitted.sample(50, generator)
    assert set(raw.unique().tolist()) <= set(range(17))
    z, log_det = data.preprocessing.forward(
        data.preprocessing.dequantize(raw, torch.Generator().manual_seed(1))
    )
    normal = torch.distributions.Normal(0.0, 1.0)
    expected = normal.log_prob(z).sum(1) + log_det - m * torch.tensor(17.0).double().log()
    torch.testing.assert_close(fitted.log_prob(raw, torch.Generator().manual_seed(1)), expected)


def test_a_plain_logit_has_no_map(make_folder, run_stage):
    folder = make_folder("digits")
    assert run_stage("prepare_data", folder)[0] == 0
    data = load_prepared(folder / "prepared")
    assert data.preprocessing.map is None


@pytest.mark.parametrize(
    ("preset", "override", "message"),
    [
        ("rings", "data.map.n_steps=1", "data.map.kind is spline, but the data are real-valued"),
        (
            "digits",
            "data.map.n_components=1198",
            "data.map.n_components is 1198: expected at most 1197",
        ),
    ],
)
def test_a_map_that_cannot_be_fitted_is_an_error_in_one_line(
    make_folder, run_stage, preset, override, message
):
    folder = make_folder(preset, *SPLINE, override)
    status, _, errors = run_stage("prepare_data", folder)
    assert status == 1
    assert errors.startswith("prepare_data: error: ")
    assert message in errors
    assert errors.count("\n") == 1
