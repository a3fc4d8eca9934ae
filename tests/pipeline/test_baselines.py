"""Rows of conf/baselines/: trained as they are, resumed, scored, written, and refused where they cannot be."""

import hashlib
import json
import sys
from dataclasses import replace
from functools import cache, partial
from itertools import count
from math import prod
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import NEEDED, ROOT, TINY, check_last_step
from sklearn.datasets import load_digits

import cpmm.pipeline.stage
from cpmm import expectation_maximization
from cpmm.artifact import load_artifact, load_header, verify_files
from cpmm.fitted import FittedMixture
from cpmm.mixture import Mixture
from cpmm.pipeline.artifacts import verify
from cpmm.pipeline.config import fingerprints
from cpmm.pipeline.config.compose import compose_preset, known_presets
from cpmm.pipeline.models import baselines
from cpmm.pipeline.models import fitted as fitted_models
from cpmm.pipeline.models.baselines import start_direct, train_baseline
from cpmm.pipeline.models.fitted import KEPT, Fitted, load_baseline
from cpmm.pipeline.scores import scorer
from cpmm.pipeline.scores.ood import OodPoints
from cpmm.pipeline.scores.scorer import Scorer, score_baseline
from cpmm.pipeline.sweeps.inputs import locate_inputs, open_inputs
from cpmm.pipeline.sweeps.plan import make_trial, set_option
from cpmm.pipeline.sweeps.trial import run_trial, summarize
from cpmm.seeds import seeded_generator
from workflows import build_spaces, prepare_data
from workflows import train_baseline as stage

ALL = sorted(path.stem for path in (ROOT / "conf" / "baselines").glob("*.yaml"))
ROWS = sorted({*ALL} - {"refined", "groups"})  # those that a trial can train
MIXTURES = {"direct", "matched", "spectral_overlap", "spectral_frechet", "curriculum", "continuous"}
NO_DENSITY = {"autoencoder", "vade", "kmeans"}
NO_CLUSTERS = {"direct", "einet_matched", "einet_large", "cnf_mlp", "cnf_conv", "gaussian"}
SMALL = [
    *TINY, "spaces=noise", "data.n_train=150", "data.n_validation=80", "data.n_test=80",
    "spaces.n_spaces=3", "cpmm.initialization.restarts=1", "cpmm.batch_size=64",
    "baselines.direct.kmeans_restarts=1", "baselines.direct.shrinkages=[20]",
    "baselines.kmeans.n_starts=1", "evaluation.teacher_points=20", "baselines.gaussian.n_draws=2",
    "baselines.matched.em_iterations=3",
    *(f"baselines.{row}.{option}" for row in ("cnf_mlp", "cnf_conv") for option in (
        "field.width=8", "field.depth=1", "field.squeeze=1", "flow_matching_epochs=2",
        "likelihood_epochs=1", "solver.n_steps=2", "n_draws=1", "exact_trace_up_to=1")),
    *(f"baselines.{row}.{option}" for row in ("einet_matched", "einet_large")
      for option in ("n_epochs=3", "n_draws=1")),
    *(f"baselines.{row}.{option}" for row in ("autoencoder", "vade")
      for option in ("hidden=[16,12]", "code_size=4", "n_starts=2", "autoencoder_epochs=2")),
    "baselines.vade.n_epochs=3",
    *(f"baselines.continuous.{option}" for option in (
        "n_epochs=2", "n_draws=1", "n_integration_points=16", "n_latent=2", "decoder.width=4")),
    *(f"baselines.{row}.{option}" for row in ("gmm_full", "gmm_diagonal")
      for option in ("n_iterations=5", "added_variances=[0.01,0.1]")),
]  # fmt: skip
RINGS = [*SMALL, "data.options.n=400", "data.n_train=null", "mixture.n_pseudotimes=4"]


@cache
def composed(*overrides, preset="digits"):
    return compose_preset(preset, [*(RINGS if preset == "rings" else SMALL), *overrides])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Data and spaces, of noise, of the tiny pipeline."""
    folder = tmp_path_factory.mktemp("home") / "digits"
    for step in (prepare_data, build_spaces):
        step.main(folder, composed())
    return folder


@pytest.fixture(scope="module")
def rings(tmp_path_factory):
    """A table: the data of a preset without images."""
    folder = tmp_path_factory.mktemp("table") / "rings"
    prepare_data.main(folder, composed(preset="rings"))
    return open_inputs(locate_inputs(composed("model=kmeans", preset="rings"), folder))[0]


@pytest.fixture(scope="module")
def trials(home, tmp_path_factory):
    """The trial of a row: configuration, data, record and folder; each row is trained once."""
    known = {}

    def train(row):
        if row not in known:
            config = composed(f"model={row}")
            inputs = open_inputs(locate_inputs(config, home))
            scratch = tmp_path_factory.mktemp(row)
            record = run_trial(
                config, *inputs, "fingerprint", scratch, quiet=True, listeners=[check_last_step]
            )
            known[row] = config, inputs, record, scratch
        return known[row]

    return train


@pytest.fixture
def fit(home, tmp_path):
    """Train a row; return the data and what was fitted."""

    def fit(row, *overrides, name="fit", data=None, **options):
        config = composed(f"model={row}", *overrides)
        found, spaces = open_inputs(locate_inputs(config, home))
        data = found if data is None else data
        (tmp_path / name).mkdir(exist_ok=True)
        options = {"quiet": True} | options
        return data, train_baseline(row, config, data, spaces, tmp_path / name, **options)

    return fit


@pytest.mark.parametrize("row", sorted(KEPT))
def test_what_is_kept_of_a_row_scores_as_it_was_trained(row, home, tmp_path):
    config = composed()
    inputs = open_inputs(locate_inputs(config, home))
    stage.main(link_inputs(home, tmp_path), config, row)
    trained = train_baseline(row, config, *inputs, tmp_path / "scratch", quiet=True)
    loaded = load_baseline(row, tmp_path, config, inputs[0])
    assert loaded.missing is trained.missing is None
    scores = [
        score_baseline(found, Scorer(inputs[0], found.split), 10, timed=False)
        for found in (trained, loaded)
    ]
    assert scores[0] == scores[1]
    assert {"density", "accuracy"} & scores[0].keys()


def test_a_row_that_cannot_be_scored_again_is_refused(home, tmp_path):
    config = composed()
    stage.main(link_inputs(home, tmp_path), config, "gmm_diagonal")
    data = open_inputs(locate_inputs(config, home))[0]
    with pytest.raises(
        ValueError, match=r"baselines\.gmm_diagonal\.kind, .* 'sklearn': choose one"
    ):
        load_baseline("gmm_diagonal", tmp_path, config, data)


@pytest.mark.parametrize("row", ["refined", "groups"])
def test_no_trial_trains_what_needs_more_than_a_trial_has(row):
    config = composed()
    with pytest.raises(ValueError, match=f"model is '{row}', which no trial trains: .*{row}`$"):
        make_trial("digits", (), 0, [], config | {"model": row}, "code")


def test_the_refined_mixture_needs_the_extracted_one(home, tmp_path):
    config = composed()
    inputs = open_inputs(locate_inputs(config, home))
    with pytest.raises(ValueError, match="starts from the mixture that the pipeline extracts"):
        train_baseline("refined", config, *inputs, tmp_path, quiet=True)


def link_inputs(home, folder):
    for name in ("prepared", "spaces"):
        (folder / name).symlink_to(home / name)
    return folder


def n_numbers(header):
    shapes = [shape for dtype, shape in header["tensors"].values() if dtype.startswith("float")]
    return sum(map(prod, shapes))  # whole numbers say which features are a region's


def density(fitted, data, split="test"):
    score = Scorer(data, split, fitted.n_points)
    with torch.no_grad():
        return score.density(fitted.log_prob(score.z))["density"]


def test_every_row_is_in_the_configuration_and_every_kind_has_a_row():
    config = composed()
    assert sorted(config["baselines"]) == ALL
    assert {options["kind"] for options in config["baselines"].values()} == set(baselines.KINDS)


@pytest.mark.parametrize("row", ROWS)
def test_every_row_is_trained_and_scored(row, trials):
    config, _, record, scratch = trials(row)
    assert record["status"] == "finished"
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    test = record["test"]
    assert ("density" in test) == ("seconds_10k" in record) == (row not in NO_DENSITY)
    if row in NO_DENSITY:
        assert record["validation"] is None
        assert summarize(record, "bits").startswith("clustering accuracy ")
    else:
        assert np.isfinite([record["validation"], test["density"]]).all()
        assert record["seconds_10k"] > 0
        assert f"test {test['density']:.4f} bits" in summarize(record, "bits")
    assert ("accuracy" in test) == (row not in NO_CLUSTERS)
    assert ("n_components" in test) == (row in MIXTURES | {"gaussian"})
    trained = config["baselines"][row]["kind"] not in ("gaussian", "sklearn", "kmeans")
    assert (record["steps"] is not None) == (record["best_epoch"] is not None) == trained
    assert {path.name for path in scratch.iterdir() if path.is_dir()} >= {"baseline"}
    header = load_header(scratch / "baseline", "baseline", "fingerprint")
    assert (header["row"], header["kind_of_model"]) == (row, config["baselines"][row]["kind"])
    verify_files(scratch / "baseline", header, header["files"])


@pytest.mark.parametrize("row", ROWS)
def test_parameters_are_the_numbers_that_are_kept(row, trials):
    config, (data, _), record, scratch = trials(row)
    n, m = record["test"]["n_parameters"], data.n_features
    c, r = config["cpmm"]["n_clusters"], config["cpmm"]["n_factors"]
    k = c * config["mixture"]["n_pseudotimes"]
    of_component = m + m * r + m + 1  # mean, loading, log d, weight
    layers = [(64, 16), (16, 12), (12, 4), (4, 12), (12, 16), (16, 64)]
    autoencoder = sum(inputs * outputs + outputs for inputs, outputs in layers)
    by_formula = {
        "matched": c * of_component,
        **dict.fromkeys(MIXTURES - {"matched"}, k * of_component),
        "gaussian": m + m * (m + 1) // 2,
        "gmm_full": c * (m + m * (m + 1) // 2 + 1),
        "gmm_diagonal": c * (m + m + 1),
        "kmeans": c * m,
        "autoencoder": autoencoder + c * 4,
        "vade": autoencoder + (12 * 4 + 4) + c + 2 * c * 4,
    }
    if row in by_formula:
        assert n == by_formula[row]
    if row in MIXTURES:
        header = load_header(scratch / "baseline" / "mixture", "mixture", "fingerprint")
        assert n == n_numbers(header)
    elif row not in ("gaussian", "gmm_full"):  # of symmetric matrices one half counts
        assert n == n_numbers(load_header(scratch / "baseline", "baseline", "fingerprint"))


def test_an_einsum_network_has_at_most_the_parameters_of_the_extracted_cpmm(trials):
    size = trials("spectral_overlap")[2]["test"]["n_parameters"]
    assert 0.5 * size < trials("einet_matched")[2]["test"]["n_parameters"] <= size
    assert 5 * size < trials("einet_large")[2]["test"]["n_parameters"] <= 10 * size


@pytest.mark.parametrize("row", ROWS)
def test_the_same_seed_is_the_same_result_and_labels_have_no_say(row, trials, fit):
    config, (data, _), record, scratch = trials(row)
    _, again = fit(row, data=replace(data, label=None))
    if again.log_prob is not None:
        assert density(again, data) == record["test"]["density"]
        assert density(again, data, "validation") == record["validation"]
    if again.predict is not None:
        for split in ("train", "validation", "test"):
            cluster = again.predict(split)
            assert (cluster.dtype, cluster.shape) == (torch.int64, data.label[split].shape)
            assert 0 <= int(cluster.min()) <= int(cluster.max()) < config["cpmm"]["n_clusters"]
        scores = Scorer(data, "test").clusters(cluster.numpy(), config["cpmm"]["n_clusters"])
        assert scores.items() <= record["test"].items()
    if again.mixture is not None:
        kept = Mixture.load(scratch / "baseline" / "mixture")
        assert torch.equal(kept.components.mean, again.mixture.components.mean.float())
        assert kept.cluster_sizes == again.mixture.cluster_sizes
    if again.weights is not None:
        tensors, _ = load_artifact(scratch / "baseline", "baseline")
        assert tensors.keys() == again.weights.keys()
        assert all(torch.equal(tensors[name], value) for name, value in again.weights.items())


@pytest.mark.parametrize("row", sorted(MIXTURES))
def test_a_mixture_is_kept_as_the_pipelines_own(row, trials):
    config, (data, _), record, scratch = trials(row)
    kept = scratch / "baseline" / "mixture"
    mixture = Mixture.load(kept).to(torch.float64)
    assert (mixture.n_clusters == config["cpmm"]["n_clusters"]) == (row not in NO_CLUSTERS)
    # The artifact is in float32, as the extracted CPMM is.
    loaded = fitted_models.of_mixture(mixture, data, config["cpmm"]["n_clusters"], {})
    got = score_baseline(loaded, Scorer(data, "test", n_first=20), 10, timed=False)
    assert got == pytest.approx(record["test"], rel=1e-6)
    exact = ("accuracy", "nmi") if row not in NO_CLUSTERS else ()
    assert {name: got[name] for name in exact}.items() <= record["test"].items()
    fitted = FittedMixture.load(kept)
    nats = fitted.log_prob(data.raw["test"], seeded_generator(data.noise_seed, 2))
    assert float(fitted.density(nats).mean()) == pytest.approx(record["test"]["density"], rel=1e-6)


def test_another_seed_is_another_result(fit):
    _, one = fit("matched", name="one")
    _, other = fit("matched", "cpmm.seed=7", name="other")
    assert not torch.equal(one.predict("test"), other.predict("test"))


def test_the_matched_mixture_is_that_of_em_where_it_is_likelier(rings, tmp_path):
    # Adam cannot move from the start with such a rate.
    still = ["baselines.matched.learning_rate=1e-30", "baselines.matched.em_iterations=9"]
    config = composed(*still, preset="rings")
    fitted = train_baseline("matched", config, rings, None, tmp_path, quiet=True)
    cpmm = config["cpmm"]
    c, floor = cpmm["n_clusters"], cpmm["log_diagonal_floor"]
    start = start_direct(
        rings, config["baselines"]["matched"], c, cpmm["n_factors"], floor, cpmm["seed"]
    )
    train, validation = (rings.points(split)[0] for split in ("train", "validation"))
    with torch.no_grad():
        first = start.mixture()
        found = expectation_maximization.fit_by_em(
            first.components.to(torch.float64), train.float().double(), validation.float().double(),
            floor, 9, patience=5, batch_size=2048,
        )  # fmt: skip
        of_start = first.to(torch.float64).log_prob(validation).mean()
        got = fitted.log_prob(validation)
    assert found.best_iteration > 0
    assert fitted.ended == {"best_epoch": found.best_iteration, "steps": len(found.history) - 1}
    assert got.mean() > of_start
    expected = Mixture(found.best.to(torch.float32), first.cluster_sizes).to(torch.float64)
    torch.testing.assert_close(got, expected.log_prob(validation))
    assert fitted.mixture.cluster_sizes == (1,) * c


@pytest.mark.parametrize("gives_up", [False, True])
def test_the_matched_mixture_is_that_of_adam_where_it_is_likelier(
    gives_up, fit, monkeypatch, capsys
):
    data, alone = fit("matched", "baselines.matched.em_iterations=0", name="alone")
    seen = []

    def no_gain(start, *arguments, **options):
        seen.append(start)
        if gives_up:
            raise FloatingPointError("its likelihood is not finite")
        return expectation_maximization.EMRun(start, start)

    monkeypatch.setattr(expectation_maximization, "fit_by_em", no_gain)
    _, fitted = fit("matched", name="both")
    assert len(seen) == 1  # from the start of Adam, which training has not changed
    for split in ("validation", "test"):
        z = data.points(split)[0]
        assert torch.equal(fitted.log_prob(z), alone.log_prob(z))
    assert fitted.ended == alone.ended
    of_start = Mixture(seen[0], (1,) * 10).log_prob(data.points("validation")[0]).mean()
    assert fitted.log_prob(data.points("validation")[0]).mean() > of_start
    said = capsys.readouterr().out
    assert ("EM gave up, Adam's is taken: its likelihood is not finite" in said) == gives_up


def test_labels_score_clusters_and_nothing_else(fit):
    data, fitted = fit("gmm_diagonal")
    generator = torch.Generator().manual_seed(0)
    label = {
        split: value[torch.randperm(len(value), generator=generator)]
        for split, value in data.label.items()
    }
    scores, of_others, without = (
        score_baseline(fitted, Scorer(replace(data, label=of), "test"), 10)
        for of in (data.label, label, None)
    )
    assert scores["density"] == of_others["density"] == without["density"]
    assert scores["accuracy"] != of_others["accuracy"]
    assert "accuracy" not in without


@pytest.mark.parametrize(("step", "n_calls"), [(2.0, 1), (0.1, 5)])
def test_a_density_that_takes_long_is_computed_once(step, n_calls, rings, monkeypatch):
    clock = count(0, step)
    monkeypatch.setattr(scorer, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    seen = []

    def log_prob(z):
        seen.append(z)
        return -z.square().sum(1)

    fitted = Fitted(3, {}, log_prob=log_prob, n_points=20)
    score = Scorer(rings, "test", 20)
    z, log_det = rings.points("validation")
    ood = OodPoints("other", 2 * z, log_det)
    got = score_baseline(fitted, score, 2, ood)
    assert [len(z) for z in seen] == [20] * (n_calls + 1)
    assert torch.equal(seen[-1], ood.z[:20])
    inside, there = (-z.square().sum(1) for z in (score.z, ood.z[:20]))
    assert got["ood"] == ood.scores(score, inside, there)
    assert got["seconds_10k"] == pytest.approx(step * 10_000 / 20)
    assert score.density(inside).items() <= got.items()


class Kill(Exception):
    """Stands for the end of a process."""


@pytest.mark.parametrize("row", ["einet_matched", "vade", "cnf_mlp"])
def test_resumed_equals_uninterrupted(row, trials, tmp_path):
    config, inputs, whole, scratch = trials(row)
    seen = []

    def kill(module):
        seen.append(module.current_epoch)
        if len(seen) == 2:
            raise Kill

    run = partial(run_trial, config, *inputs, "fingerprint", tmp_path, quiet=True, listeners=[kill])
    with pytest.raises(Kill):
        run()
    resumed = run()
    assert seen == [0, 1, 1, 2]  # the epoch that was cut is done again, not those before
    costs = {"seconds": 0, "seconds_10k": 0, "memory_gb": 0}
    assert resumed | costs == whole | costs
    for name in ("baseline.safetensors", "baseline.json"):
        files = [folder / "baseline" / name for folder in (tmp_path, scratch)]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("row", "least"), [("vade", 2), ("cnf_mlp", 8), ("matched", 3), ("kmeans", 0)]
)
def test_rows_give_signs_of_life_where_no_epoch_ends(row, least, trials, tmp_path):
    config, inputs, _, _ = trials(row)
    signs = []  # of the epochs of VaDE's autoencoder, a flow's four evaluations a step of two splits, EM
    run_trial(config, *inputs, "fingerprint", tmp_path, lambda: signs.append(1), quiet=True)
    assert len(signs) >= least
    assert bool(signs) == bool(least)


def test_a_flow_says_how_far_its_densities_are(trials, tmp_path, capsys):
    config, inputs, _, _ = trials("cnf_mlp")
    fitted = train_baseline("cnf_mlp", config, *inputs, tmp_path, quiet=False)
    fitted.log_prob(inputs[0].points("test")[0][:3])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("baseline cnf_mlp | 3/3 points | ")
    assert line.endswith("calls of the field a batch | eta 0.0m")


@pytest.mark.parametrize(
    ("row", "overrides", "said"),
    [
        ("cnf_conv", [], r"^baselines\.cnf_conv\.field\.kind is 'conv', but the data are no images: choose mlp"),
        ("continuous", ["baselines.continuous.decoder.kind=conv"],
         r"baselines\.continuous\.decoder\.kind is 'conv', but the data are no images: choose mlp"),
        ("matche", [], r"model is 'matche': choose one of .*matched, .*kmeans"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(row, overrides, said, rings, tmp_path):
    with pytest.raises(ValueError, match=said):
        train_baseline(row, composed(*overrides, preset="rings"), rings, None, tmp_path)


@pytest.mark.parametrize(
    "row", ["continuous", "einet_matched", "cnf_mlp", "autoencoder", "gmm_full"]
)
def test_what_takes_images_is_trained_on_a_table(row, rings, tmp_path):
    config = composed(f"model={row}", preset="rings")
    record = run_trial(config, rings, None, "fingerprint", tmp_path, quiet=True)
    assert record["status"] == "finished"
    assert "density" in record["test"] or "accuracy" in record["test"]


@pytest.mark.parametrize("row", ["autoencoder", "vade", "cnf_mlp"])
def test_what_is_trained_in_double_precision_takes_points_as_ever(row, rings, tmp_path):
    config = composed("trainer.precision=64-true", preset="rings")
    fitted = train_baseline(row, config, rings, None, tmp_path, quiet=True)
    assert all(value.dtype == torch.float32 for value in fitted.weights.values())
    if row in NO_DENSITY:
        assert fitted.predict("test").shape == rings.label["test"].shape
    else:
        assert np.isfinite(density(fitted, rings))


@pytest.mark.parametrize("preset", known_presets())
def test_a_preset_of_tables_decodes_without_convolutions(preset):
    config = compose_preset(preset, NEEDED.get(preset, []))
    decoder = config["baselines"]["continuous"]["decoder"]
    assert decoder["kind"] == config["cpmm"]["field"]["kind"]


@pytest.mark.parametrize(
    ("row", "override", "said"),
    [
        ("gmm_full", "baselines.gmm_full.n_points=3",
         r"baselines\.gmm_full\.n_points is 3: expected at least 10, .*: raise it"),
        *((row, f"baselines.{row}.noise=0.1",
           rf"baselines\.{row}\.noise is 0\.1: expected 0, .* set it to 0, or .*\.likelihood=gaussian")
          for row in ("autoencoder", "vade")),
        ("spectral_frechet", "baselines.spectral_frechet.merge.neighbour=30",
         r"baselines\.spectral_frechet\.merge\.neighbour is 30: expected less than the 30 components"),
    ],
)  # fmt: skip
def test_what_cannot_be_fitted_is_refused_before_it_is(row, override, said, fit, monkeypatch):
    monkeypatch.setattr(baselines, "fit", lambda *arguments, **options: pytest.fail("trained"))
    with pytest.raises(ValueError, match=f"^{said}"):
        fit(row, override)


def test_an_autoencoder_of_a_table_takes_noise(rings, tmp_path):
    config = composed("baselines.autoencoder.noise=0.1", preset="rings")
    fitted = train_baseline("autoencoder", config, rings, None, tmp_path, quiet=True)
    assert fitted.predict("test").shape == rings.label["test"].shape


def test_autoencoders_take_a_table_as_it_is_and_images_as_grey_levels(rings, trials, tmp_path):
    # The Bernoulli likelihood would refuse points outside [0, 1], and it has no variance.
    config = composed(preset="rings")
    assert config["baselines"]["vade"]["likelihood"] == "bernoulli"
    points = rings.points("train")[0]
    assert points.min() < 0
    fitted = train_baseline("vade", config, rings, None, tmp_path, quiet=True)
    assert "output_log_variance.weight" in fitted.weights
    _, (data, _), _, scratch = trials("vade")
    tensors, _ = load_artifact(scratch / "baseline", "baseline")
    assert not any("output_log_variance" in name for name in tensors)
    run = baselines.Run("vade", composed(), data, None, None, tmp_path, {}, {}, lambda: None)
    points, likelihood = baselines._grey(run)
    assert likelihood == "bernoulli"
    assert torch.equal(points("test") * 16, data.raw["test"].float())
    chosen = composed("baselines.vade.likelihood=gaussian")
    points, likelihood = baselines._grey(replace(run, config=chosen))
    assert likelihood == "gaussian"
    assert torch.equal(points("test"), data.points("test")[0].float())


def test_several_processes_train_no_baseline(home, tmp_path):
    config = composed("model=matched")
    inputs = open_inputs(locate_inputs(config, home))
    with pytest.raises(ValueError, match=r"ray\.workers above 1 trains cpmm alone: .*'matched'"):
        run_trial(config, *inputs, "fingerprint", tmp_path, quiet=True, ddp={"devices": 2})


def test_a_baseline_that_diverges_says_so(home, tmp_path):
    rate = ["baselines.einet_matched.learning_rate=1", "baselines.einet_matched.gradient_clip=1"]
    config = composed("model=einet_matched", *rate)
    data, _ = open_inputs(locate_inputs(config, home))
    config = set_option(config, "baselines.einet_matched.learning_rate", 1e30)
    record = run_trial(config, data, None, "fingerprint", tmp_path, quiet=True)
    assert record["status"] == "diverged"
    assert record["step"] >= 1
    assert "lower the learning rate" in record["reason"]
    assert not (tmp_path / "baseline").exists()


def ood_options(path):
    return [
        "ood@evaluation.ood=npy", f"evaluation.ood.options.path={path}",
        "evaluation.ood.options.levels=17", "evaluation.ood.name=negative",
    ]  # fmt: skip


def test_another_data_set_is_told_apart_where_it_is_at_hand(home, tmp_path):
    path = tmp_path / "negative.npy"
    config = composed("model=gaussian", *ood_options(path))
    inputs = open_inputs(locate_inputs(config, home))
    record = run_trial(config, *inputs, "fingerprint", tmp_path / "missing", quiet=True)
    assert record["status"] == "finished"
    assert str(path) in record["ood_missing"]
    said = f"not scored on another data set: {record['ood_missing']}"
    assert summarize(record, "bits").endswith(said)
    assert "auroc" not in record
    np.save(path, 16 - load_digits().images[:60].astype(np.uint8))
    told = run_trial(config, *inputs, "fingerprint", tmp_path / "there", quiet=True)
    assert "ood_missing" not in told
    assert "another data set" not in summarize(told, "bits")
    assert told["test"] == record["test"]
    for name in ("auroc", "aupr", "auroc_data", "aupr_data"):
        assert 0 <= told[name] <= 1
    clusters = composed("model=kmeans", *ood_options(path))
    assert "auroc" not in run_trial(
        clusters, *inputs, "fingerprint", tmp_path / "kmeans", quiet=True
    )


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the stage as its command does; return its exit status and what it printed."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["train_baseline.py", *map(str, arguments)])
        capsys.readouterr()
        try:
            cpmm.pipeline.stage.run_stage(stage.main, stage.__doc__, "row")
            status = 0
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def preset(home, tmp_path):
    """A preset's folder with prepared data and a composed configuration."""
    folder = tmp_path / "data" / "digits"
    folder.mkdir(parents=True)
    for name in ("prepared", "spaces"):
        (folder / name).symlink_to(home / name)
    (folder / "config.yaml").write_text(yaml.safe_dump(composed(), sort_keys=False))
    return folder


@pytest.mark.parametrize("row", ["kmeans", "matched", "curriculum", "gaussian"])
def test_the_stage_writes_scores_and_a_sealed_model(row, preset, command, trials):
    status, out, err = command(preset / "config.yaml", row)
    assert (status, err) == (0, "")
    folder = preset / "baselines" / row
    last = out.splitlines()[-1]
    assert last.startswith(f"train_baseline: {row}: test ")
    assert last.endswith(f" -> {folder}")
    scores = json.loads((folder / "scores.json").read_text())
    expected = {"row": row, "unit": "bits per dimension", **trials(row)[2]["test"]}
    assert scores == expected
    header = load_header(folder, "baseline", fingerprints.fingerprint_baseline(composed(), row))
    assert "scores.json" in header["files"]
    verify_files(folder, header, header["files"])
    if row in MIXTURES:
        ours, theirs = (
            f / "mixture" / "mixture.safetensors" for f in (folder, trials(row)[3] / "baseline")
        )
        assert ours.read_bytes() == theirs.read_bytes()
    assert not any((preset / ".scratch").iterdir())


def test_the_stage_tells_another_data_set_apart(preset, command, tmp_path):
    path = tmp_path / "negative.npy"
    np.save(path, 16 - load_digits().images[:60].astype(np.uint8))
    config = composed(*ood_options(path))
    (preset / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    assert command(preset / "config.yaml", "gmm_diagonal")[0] == 0
    scores = json.loads((preset / "baselines" / "gmm_diagonal" / "scores.json").read_text())
    assert 0 <= scores["ood"]["data"]["auroc"] <= 1
    assert command(preset / "config.yaml", "kmeans")[0] == 0
    assert "ood" not in json.loads((preset / "baselines" / "kmeans" / "scores.json").read_text())


def test_the_command_explains_itself(command, preset):
    status, out, _ = command("--help")
    assert status == 0
    assert "Train and score a row of conf/baselines/" in out
    assert "row" in out
    status, _, err = command(preset / "config.yaml")
    assert status == 2
    assert "row" in err.splitlines()[-1]


def test_a_model_without_a_finite_density_is_a_row_with_its_reason(command, preset, monkeypatch):
    def log_prob(z):
        return torch.cat([z[1:, 0], z.new_tensor([float("nan")])])

    broken = Fitted(1, {}, log_prob=log_prob, weights={"mean": torch.zeros(1)})
    monkeypatch.setitem(baselines.KINDS, "gaussian", lambda run: broken)
    status, out, err = command(preset / "config.yaml", "gaussian")
    assert (status, err) == (0, "")
    said = "the density of the trained model is not finite on the test split: 1 of "
    assert f"gaussian: a row without a model: {said}" in out
    place = preset / "baselines" / "gaussian"
    assert load_header(place, "baseline")["missing"].startswith(said)
    assert json.loads((place / "scores.json").read_text()).keys() == {"row", "unit"}


def test_an_unknown_row_ends_in_one_line(command, preset):
    status, out, err = command(preset / "config.yaml", "matche")
    assert (status, out) == (1, "")
    (line,) = err.splitlines()
    assert line.startswith("train_baseline: error: there is no baseline 'matche': choose one of ")
    assert all(row in line for row in ALL)
    assert not (preset / "baselines").exists()


@pytest.fixture(scope="module")
def config():
    return compose_preset("digits", [])


OPTIONS = {
    "direct": ("epochs", 3), "refined": ("epochs", 3), "groups": ("kind", "other"), "curriculum": ("shrinkage", 3), "continuous": ("n_integration_points", 9),
    "einet": ("n_replicas", 2), "flow": ("likelihood_epochs", 9), "autoencoder": ("code_size", 3),
    "vade": ("n_epochs", 9), "gaussian": ("n_draws", 3), "sklearn": ("n_iterations", 9),
    "kmeans": ("n_starts", 9),
}  # fmt: skip


@pytest.mark.parametrize("row", ALL)
def test_a_mark_is_that_of_the_rows_own_options(row, config):
    option, value = OPTIONS[config["baselines"][row]["kind"]]
    changed = set_option(config, f"baselines.{row}.{option}", value)
    before, after = (
        {name: fingerprints.fingerprint_baseline(c, name) for name in ALL}
        for c in (config, changed)
    )
    # A row of one kind is told from another by its options, so there are no two the same.
    assert len(set(before.values())) == len(ALL)
    assert {name for name in ALL if before[name] != after[name]} == {row}


@pytest.mark.parametrize("row", ALL)
def test_a_mark_changes_with_the_sizes_and_data_that_cpmm_has(row, config):
    for option, value in (
        ("cpmm.n_clusters", 7), ("cpmm.n_factors", 2), ("cpmm.log_diagonal_floor", -9),
        ("cpmm.seed", 3), ("mixture.n_pseudotimes", 9), ("data.split_seed", 1),
        ("trainer.precision", "64-true"), ("evaluation.teacher_points", 9),
    ):  # fmt: skip
        changed = set_option(config, option, value)
        assert fingerprints.fingerprint_baseline(changed, row) != fingerprints.fingerprint_baseline(
            config, row
        ), option
    for option, value in (("trainer.threads", 3), ("evaluation.discretizations", [3])):
        changed = set_option(config, option, value)
        assert fingerprints.fingerprint_baseline(changed, row) == fingerprints.fingerprint_baseline(
            config, row
        ), option


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("row", ALL)
def test_only_the_rows_that_cpmms_options_train_change_with_them(row, guided, config):
    config = set_option(config, "cpmm.curriculum", guided)
    changed = set_option(config, "cpmm.noise", 0.37)
    same = fingerprints.fingerprint_baseline(changed, row) == fingerprints.fingerprint_baseline(
        config, row
    )
    assert same == (row not in ("curriculum", "refined", "groups"))


def test_only_curriculum_and_cpmm_need_spaces(config):
    for model in ("cpmm", *ALL):
        of_model = config | {"model": model}
        prepared, spaces = fingerprints.fingerprint_inputs(of_model)
        assert prepared == fingerprints.fingerprint_prepared(config)
        assert (spaces is not None) == (model in ("cpmm", "curriculum"))
        assert (
            fingerprints.fingerprint_inputs(set_option(of_model, "cpmm.curriculum", False))[1]
            is None
        )


def test_a_damaged_baseline_is_found(preset, command, monkeypatch):
    for row in ("kmeans", "matched"):
        assert command(preset / "config.yaml", row)[0] == 0
    project = preset.parent.parent
    monkeypatch.setattr(verify, "ROOT", project)
    monkeypatch.chdir(project)
    names = ["config.yaml", "baselines/kmeans", "baselines/matched"]

    def lock():
        outs = [{"path": f"data/digits/{name}", "md5": digest(preset / name)} for name in names]
        (project / "dvc.lock").write_text(yaml.safe_dump({"stages": {"all": {"outs": outs}}}))

    def faults():
        return {name: fault for name, fault in verify.verify_preset("digits") if fault}

    lock()
    assert len(list(verify.verify_preset("digits"))) == 3
    assert faults() == {}
    paths = [p for row in names[1:] for p in (preset / row).rglob("*") if p.is_file()]
    assert {path.name for path in paths} >= {"scores.json", "baseline.json", "mixture.safetensors"}
    for path in paths:
        content = path.read_bytes()
        at = len(content) // 3
        damaged = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        owner = next(name for name in names if path.is_relative_to(preset / name))
        for relock in (
            False,
            True,
        ):  # by DVC's hash; and if that is of the damaged file, by the seal
            path.write_bytes(damaged)
            if relock:
                lock()
            found = faults()
            assert list(found) == [f"data/digits/{owner}"], path
            assert "dvc repro" in found[f"data/digits/{owner}"]
            path.write_bytes(content)
            lock()
    changed = composed("baselines.matched.epochs=3")
    (preset / "config.yaml").write_text(yaml.safe_dump(changed, sort_keys=False))
    lock()
    (found,) = faults().items()
    assert found[0] == "data/digits/baselines/matched"
    assert "fingerprint" in found[1]


def digest(path):
    """Of an output, as dvc.lock states it."""
    if path.is_file():
        return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    files = sorted(p for p in path.rglob("*") if p.is_file())
    names = sorted(p.relative_to(path).as_posix() for p in files)
    listed = [{"md5": digest(path / name), "relpath": name} for name in names]
    text = json.dumps(listed, sort_keys=True)
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest() + ".dir"
