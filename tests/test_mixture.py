from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import softmax

from cpmm.artifact import save_artifact
from cpmm.factor_analyzers import FactorAnalyzers
from cpmm.mixture import Mixture
from tests.oracles import (
    assert_moments,
    dense_component_log_prob,
    dense_log_prob,
    mixture_moments,
    random_factor_analyzers,
    torch_mixture,
)

SIZES = (2, 1, 3)


@pytest.fixture
def mixture(generator) -> Mixture:
    return Mixture(random_factor_analyzers(generator, 6, 4, 2), SIZES)


@pytest.fixture
def x(generator) -> torch.Tensor:
    return 3 * torch.randn(50, 4, generator=generator, dtype=torch.float64)


def test_log_prob_is_that_of_torchs_mixture(mixture, x):
    expected = torch_mixture(mixture.components).log_prob(x)
    torch.testing.assert_close(mixture.log_prob(x), expected, rtol=1e-9, atol=0)


def test_log_prob_is_that_of_scipy(mixture, x):
    expected = dense_log_prob(x, mixture.components)
    np.testing.assert_allclose(mixture.log_prob(x), expected, rtol=1e-9)


def test_log_prob_at_image_size(generator):
    fa = random_factor_analyzers(generator, 10, 784, 6)
    x = Mixture(fa, (10,)).sample(20, generator)[0]
    expected = torch_mixture(fa).log_prob(x)
    torch.testing.assert_close(Mixture(fa, (10,)).log_prob(x), expected, rtol=1e-9, atol=0)


def test_density_integrates_to_one_in_two_dimensions(generator):
    mixture = Mixture(random_factor_analyzers(generator, 4, 2, 1), (4,), batch_size=1 << 14)
    axis = torch.linspace(-20, 20, 801, dtype=torch.float64)
    with torch.no_grad():
        density = mixture.log_prob(torch.cartesian_prod(axis, axis)).exp()
    assert float(density.sum() * (axis[1] - axis[0]) ** 2) == pytest.approx(1, rel=1e-9)


def test_log_prob_passes_gradcheck(mixture, x):
    inputs = [value.clone().requires_grad_() for value in vars(mixture.components).values()]

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        return Mixture(FactorAnalyzers(*tensors), SIZES).log_prob(x[:4])

    assert torch.autograd.gradcheck(function, inputs)


def test_clusters_of_one_component_have_its_density(mixture, x):
    alone = replace(mixture, cluster_sizes=(1,) * 6)
    assert torch.equal(alone.cluster_joint_log_prob(x), mixture.joint_log_prob(x))
    expected = mixture.joint_log_prob(x)[:, :2].logsumexp(1)
    assert torch.equal(mixture.cluster_joint_log_prob(x)[:, 0], expected)
    assert torch.equal(alone.predict(x), mixture.joint_log_prob(x).argmax(1))
    never = replace(alone.components, log_weight=torch.tensor([0.0, *[-math.inf] * 5]).double())
    x = x.requires_grad_()
    replace(alone, components=never).cluster_joint_log_prob(x).logsumexp(1).sum().backward()
    assert torch.isfinite(x.grad).all()  # a sum over one component of weight zero had none


@pytest.mark.parametrize("batch_size", [1, 7, 50, 64])
def test_batches_change_nothing(mixture, x, batch_size):
    batched = replace(mixture, batch_size=batch_size)
    for name in ("log_prob", "component_responsibilities", "cluster_responsibilities", "predict"):
        with torch.no_grad():
            # Matrix products of another height may round otherwise.
            torch.testing.assert_close(
                getattr(batched, name)(x), getattr(mixture, name)(x), rtol=1e-12, atol=1e-13
            )


def test_responsibilities_are_bayes_rule(mixture, x):
    joint = dense_component_log_prob(x, mixture.components) + mixture.components.log_weight.numpy()
    posterior = softmax(joint, axis=1)
    np.testing.assert_allclose(mixture.component_responsibilities(x), posterior, atol=1e-12)
    by_cluster = np.stack([posterior[:, :2].sum(1), posterior[:, 2], posterior[:, 3:].sum(1)], 1)
    cluster = mixture.cluster_responsibilities(x)
    np.testing.assert_allclose(cluster, by_cluster, atol=1e-12)
    np.testing.assert_allclose(cluster.sum(1), 1, rtol=1e-14)
    np.testing.assert_array_equal(mixture.predict(x), by_cluster.argmax(1))
    np.testing.assert_allclose(
        mixture.cluster_joint_log_prob(x).logsumexp(1), mixture.log_prob(x), rtol=1e-12
    )


def test_samples_have_the_mixtures_moments_and_weights(mixture, generator):
    n = 50_000
    points, index = mixture.sample(n, generator)
    assert_moments(points, *mixture_moments(mixture.components))
    weight = mixture.components.log_weight.exp()
    share = torch.bincount(index, minlength=6) / n
    assert bool(((share - weight).abs() < 5 * (weight * (1 - weight) / n).sqrt()).all())


def test_same_seed_gives_the_same_samples(mixture):
    first, second = (mixture.sample(10, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_cluster_of_each_component(mixture):
    assert mixture.cluster.tolist() == [0, 0, 1, 2, 2, 2]
    assert (mixture.n_clusters, mixture.n_features) == (3, 4)


@pytest.mark.parametrize("sizes", [(2, 3), (7, -1), ()])
def test_cluster_sizes_that_do_not_sum_to_k_raise(mixture, sizes):
    with pytest.raises(ValueError, match="cluster_sizes must sum to K = 6"):
        Mixture(mixture.components, sizes)


def test_without_idle_components_keeps_the_busy_ones(mixture, x):
    fa = mixture.components
    fa.mean[2] = 1e3  # all of cluster 1
    fa.mean[4] = -1e3
    joint = dense_component_log_prob(x, fa) + fa.log_weight.numpy()
    busy = sorted(set(joint.argmax(1).tolist()))
    assert {2, 4}.isdisjoint(busy)
    kept = mixture.without_idle_components(x)
    cluster = mixture.cluster.tolist()
    assert kept.cluster_sizes == tuple([cluster[k] for k in busy].count(c) for c in range(3))
    assert torch.equal(kept.components.mean, fa.mean[busy])
    np.testing.assert_allclose(kept.log_prob(x), dense_log_prob(x, fa.select(busy)), rtol=1e-9)
    # A cluster without components is never chosen, and breaks nothing.
    responsibilities = kept.cluster_responsibilities(x)
    assert bool((responsibilities[:, 1] == 0).all())
    np.testing.assert_allclose(responsibilities.sum(1), 1, rtol=1e-12)
    assert 1 not in kept.predict(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_load_returns_what_was_saved(tmp_path, mixture, dtype):
    saved = mixture.to(dtype)
    saved.save(tmp_path / "new", {"preset": "moons"})
    loaded = Mixture.load(tmp_path / "new")
    assert loaded.cluster_sizes == SIZES
    for name, value in vars(saved.components).items():
        assert torch.equal(getattr(loaded.components, name), value), name
        assert getattr(loaded.components, name).dtype == dtype
    header = json.loads((tmp_path / "new" / "mixture.json").read_text())
    assert (header["preset"], header["n_components"], header["n_factors"]) == ("moons", 6, 2)


def test_save_takes_views_that_need_gradients(tmp_path):
    state = torch.randn(2, 9, requires_grad=True)
    fa = FactorAnalyzers(
        log_weight=torch.zeros(2).log_softmax(0),
        mean=state[:, :3],
        loading=state[:, 3:6].unsqueeze(-1),
        log_diagonal=state[:, 6:7].expand(2, 3),
    )
    Mixture(fa, (1, 1)).save(tmp_path)
    loaded = Mixture.load(tmp_path).components
    assert torch.equal(loaded.log_diagonal, fa.log_diagonal)
    assert not loaded.mean.requires_grad


def test_loading_needs_no_ode_and_no_training_library(tmp_path, mixture):
    mixture.save(tmp_path)
    code = (
        "import sys; from cpmm.mixture import Mixture; Mixture.load(sys.argv[1]); "
        "heavy = {'torchdiffeq', 'pytorch_lightning', 'sklearn'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["mixture.json", "mixture.safetensors"])
def test_a_missing_file_is_named(tmp_path, mixture, name):
    mixture.save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        Mixture.load(tmp_path)


@pytest.mark.parametrize("name", ["mixture.json", "mixture.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
def test_a_truncated_file_raises(tmp_path, mixture, name, share):
    mixture.save(tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="damaged"):
        Mixture.load(tmp_path)


def test_a_flipped_bit_of_the_tensors_raises(tmp_path, mixture):
    mixture.save(tmp_path)
    path = tmp_path / "mixture.safetensors"
    content = path.read_bytes()
    for position in range(0, len(content), 97):
        broken = bytearray(content)
        broken[position] ^= 1 << position % 8
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="damaged"):
            Mixture.load(tmp_path)


def test_a_flipped_bit_of_the_header_raises(tmp_path, mixture):
    mixture.save(tmp_path)
    path = tmp_path / "mixture.json"
    content = path.read_bytes()
    for position in range(len(content)):
        broken = bytearray(content)
        broken[position] ^= 1 << position % 8
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"mixture\.json"):
            Mixture.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 1}, "expected kind 'mixture' of schema 2, got kind 'mixture' of schema 1"),
        ({"kind": "teacher"}, "kind 'teacher'"),
        ({"cluster_sizes": [1, 2, 3]}, "damaged or was edited"),
    ],
)
def test_an_edited_header_raises(tmp_path, mixture, changes, message):
    mixture.save(tmp_path)
    path = tmp_path / "mixture.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        Mixture.load(tmp_path)


@pytest.mark.parametrize("sizes", [None, "213", [2, 1, "3"], [2, 1, 4]])
def test_a_header_whose_clusters_do_not_fit_raises(tmp_path, mixture, sizes):
    save_artifact(tmp_path, "mixture", vars(mixture.components), {"cluster_sizes": sizes})
    with pytest.raises(ValueError, match="cluster_sizes"):
        Mixture.load(tmp_path)


def test_a_mixture_of_another_configuration_raises_and_names_both(tmp_path, mixture):
    mixture.save(tmp_path, {"fingerprint": "0123"})
    assert Mixture.load(tmp_path, fingerprint="0123").cluster_sizes == SIZES
    with pytest.raises(ValueError, match="fingerprint 0123, expected 4567"):
        Mixture.load(tmp_path, fingerprint="4567")


def test_values_that_are_not_finite_raise(tmp_path, mixture):
    mixture.components.mean[0, 0] = float("nan")
    mixture.save(tmp_path)
    with pytest.raises(ValueError, match="not finite"):
        Mixture.load(tmp_path)


def test_tensors_that_disagree_raise(tmp_path, mixture):
    tensors = vars(mixture.components) | {"mean": torch.zeros(5, 4)}
    save_artifact(tmp_path, "mixture", tensors, {"cluster_sizes": SIZES})
    with pytest.raises(ValueError, match="must agree on K, M and R"):
        Mixture.load(tmp_path)


def test_tensors_of_something_else_raise(tmp_path):
    save_artifact(tmp_path, "mixture", {"mean": torch.zeros(5, 4)}, {"cluster_sizes": [5]})
    with pytest.raises(ValueError, match=r"tensors \['mean'\]"):
        Mixture.load(tmp_path)
