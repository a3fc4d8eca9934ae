"""Models that CPMM is compared with: one function a kind, that trains a row of conf/baselines/."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from cpmm.data import DataSplits
from cpmm.direct import DirectMixture
from cpmm.initialization import (
    TooFewPointsError,
    count_distinct,
    group_axes,
    kmeans,
    shrunk_factor_analyzers,
)  # fmt: skip
from cpmm.mixture import Mixture
from cpmm.pipeline.config import Config, pick
from cpmm.pipeline.models.fit import drawn_rows, fit
from cpmm.pipeline.models.fitted import (
    NOT_TRAINED,
    Fitted,
    of_gaussian,
    of_groups,
    of_kmeans,
    of_mixture,
)  # fmt: skip
from cpmm.pipeline.models.runtime import choose, compute_device, seeded
from cpmm.pipeline.models.trajectories import make_groups, make_layout, n_factors
from cpmm.seeds import seeded_generator
from cpmm.spaces import Curriculum
from cpmm.training.epochs import EpochData, Recorded, Rows
from cpmm.training.likelihood import MixtureOptions
from cpmm.training.loss import LossTraining
from cpmm.training.mixture import MixtureTraining

if TYPE_CHECKING:
    from cpmm.pipeline.artifacts.spaces import Spaces


T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """What a baseline is made from.

    Attributes:
        row: Its name, a file of conf/baselines/.
        config: The whole composed configuration.
        data: The splits.
        spaces: The curriculum, for the rows that have one.
        extracted: The CPMM's own mixture, for the rows that start from it.
        scratch: Where its checkpoints lie: that of the last training in the folder itself, those of
            trainings before it in folders of their own.
        options: Further ones of :func:`cpmm.pipeline.models.fit.fit`, for the last training.
        progress: Its entry ``module`` is what is being trained.
        alive: To be called now and then where nothing else says that the row is at work.
    """

    row: str
    config: Config
    data: DataSplits
    spaces: Spaces | None
    extracted: Mixture | None
    scratch: Path
    options: Mapping[str, Any]
    progress: dict[str, Any]
    alive: Callable[[], None]

    @property
    def section(self) -> Config:
        """Options of the row."""
        return self.config["baselines"][self.row]

    @property
    def seed(self) -> int:
        """Of all that the row draws: that of trials."""
        return self.config["cpmm"]["seed"]

    @property
    def n_clusters(self) -> int:
        """C, as CPMM has."""
        return self.config["cpmm"]["n_clusters"]

    @property
    def n_components(self) -> int:
        """K: the row's own if it has one, else C G as CPMM extracts, idle ones included."""
        n_pseudotimes = self.config["mixture"]["n_pseudotimes"]
        return self.n_clusters * self.section.get("n_per_cluster", n_pseudotimes)

    @property
    def n_factors(self) -> int:
        """R, as CPMM has."""
        return n_factors(self.config["cpmm"], self.data)

    @property
    def floor(self) -> float:
        """Lower bound of log-variances."""
        return self.config["cpmm"]["log_diagonal_floor"]

    @property
    def train(self) -> Tensor:
        """Training points with one noise sample, (N, M), float32."""
        return self.data.points("train")[0].float()

    @property
    def validation(self) -> Tensor:
        """Validation points, (N', M), float32."""
        return self.data.points("validation")[0].float()

    def generator(self, stream: int) -> torch.Generator:
        """Source of draws; streams from 40 on are the baselines'."""
        return seeded_generator(self.seed, stream)

    def fit(self, module: Recorded, rows: EpochData, first: str | None = None) -> None:
        """Train a module; ``first`` names a training that is not the last one."""
        scratch, options, name = self.scratch, self.options, f"baseline {self.row}"
        if first is not None:  # its epochs are not those that listeners count
            quiet = options.get("quiet", False)
            options = {"quiet": quiet, "listeners": [lambda _: self.alive()]}
            scratch, name = scratch / first, f"{name}, {first}"
        scratch.mkdir(parents=True, exist_ok=True)
        self.progress["module"] = module
        clip = self.section["gradient_clip"]
        fit(name, module, rows, self.config["trainer"], scratch, clip, **options)

    def draws(self) -> EpochData:
        """Augmented, freshly dequantized training points for each epoch."""
        return drawn_rows(self.data, **pick(self.section, "n_draws", "batch_size"), seed=self.seed)

    def same(self, points: Callable[[str], Tensor]) -> EpochData:
        """The same rows of each split for every epoch."""
        x, validation = points("train"), points("validation")
        return EpochData(
            lambda epoch, generator: Rows(x=x),
            lambda epoch: validation,
            self.section["batch_size"],
            self.seed,
            lambda epoch: len(x),
        )

    def fit_loss(self, model: nn.Module, rows: EpochData, density: bool = True) -> dict[str, Any]:
        """Train a model by its own loss and the row's options; the best epoch by validation."""
        options = pick(self.section, "n_epochs", "noise", "learning_rate", "n_warmup_epochs")
        module = LossTraining(model, **options, density=density, seed=self.seed)
        self.fit(module, rows)
        model.cpu().float().eval()
        return ended(module)


def train_baseline(
    row: str,
    config: Config,
    data: DataSplits,
    spaces: Spaces | None,
    scratch: Path,
    progress: dict[str, Any] | None = None,
    alive: Callable[[], None] = lambda: None,
    extracted: Mixture | None = None,
    **options: Any,
) -> Fitted:
    """Train a row of conf/baselines/, from the checkpoints in ``scratch`` if there are any.

    The arguments are those of :class:`Run`. Only rows of kind "curriculum" need ``spaces``, only
    those of kind "refined" need ``extracted``. While a training before the last one, or a flow's
    solver, is at work, ``alive`` is called now and then.

    A row that needs more points than there are is fitted smaller, and its ``note`` says so.

    Raises:
        ValueError: If there is no such row, an option of it is out of range, or the data do not
            suffice.
        FloatingPointError: If it diverges.
    """
    section = choose("model", row, config["baselines"])
    build = choose(f"baselines.{row}.kind", section["kind"], KINDS)
    progress = {} if progress is None else progress
    run = Run(row, config, data, spaces, extracted, scratch, options, progress, alive)
    merge = section.get("merge")
    neighbour = merge["neighbour"] if merge and merge["affinity"] == "frechet" else None
    if neighbour is not None and neighbour >= run.n_components:
        raise ValueError(
            f"baselines.{row}.merge.neighbour is {neighbour}: expected less than the "
            f"{run.n_components} components"
        )
    return build(run)


def ended(module: Recorded) -> dict[str, int | None]:
    """How a training ended, for records."""
    return {"best_epoch": module.best_summary()["epoch"], "steps": module.history[-1]["step"]}


def as_many(fit: Callable[[int], T], n: int) -> tuple[T, int]:
    """Fit ``n`` groups, or as many as there are distinct points; return how many those are."""
    while True:
        try:
            return fit(n), n
        except TooFewPointsError as error:
            if not 1 <= error.n_found < n:
                raise
            n = error.n_found


def fewer(what: str, n: int, asked: int) -> str | None:
    """The note of a row that has ``n`` clusters or components in place of those ``asked``."""
    if n >= asked:
        return None
    return f"{n} {what} in place of {asked}: there are no more distinct points to start them from"


def _merge(run: Run, mixture: Mixture) -> Mixture:
    """Merge components into C clusters, or as many as there are components, by their affinity."""
    from cpmm.baselines import merging

    options, n_components = run.section["merge"], mixture.components.n_components
    if options["affinity"] == "overlap":
        affinity = merging.overlap_affinity(mixture, run.train, options["temperature"])
    else:
        distance = merging.frechet_distances(mixture.components.to(torch.float64))
        neighbour = options["neighbour"]
        if neighbour is not None and run.n_components > n_components:  # of a row fitted smaller
            neighbour = min(neighbour, n_components - 1)
        affinity = merging.gaussian_affinity(distance, neighbour)
    n_clusters = min(run.n_clusters, n_components)
    return merging.merge_components(mixture, affinity, n_clusters, run.generator(41))


def start_direct(
    data: DataSplits, options: Config, n_components: int, n_factors: int, floor: float, seed: int
) -> DirectMixture:
    """Start K components of R factors by k-means and local factor analysis.

    Of the shrinkages of the local covariances, that of the best validation likelihood is taken.
    """
    x = data.points("train")[0].float()
    validation = data.points("validation")[0].float()
    generator = seeded_generator(seed, 30)
    label = kmeans(x, n_components, generator, options["kmeans_restarts"], options["kmeans_points"])
    groups = group_axes(x, label, n_components, n_factors)
    starts = [
        DirectMixture(shrunk_factor_analyzers(groups, floor, shrinkage), floor)
        for shrinkage in options["shrinkages"]
    ]
    with torch.no_grad():
        return max(starts, key=lambda model: float(model.mixture().log_prob(validation).mean()))


def _direct(run: Run) -> Fitted:
    """Directly optimized factor analyzers: a cluster each, or merged into C clusters."""
    options = run.section
    start, n_components = as_many(
        lambda k: start_direct(run.data, options, k, run.n_factors, run.floor, run.seed),
        run.n_components,
    )
    with torch.no_grad():
        first = start.mixture()  # a copy: training changes the parameters in place
        first = replace(first, components=first.components.select(torch.arange(n_components)))
    mixture, how = _optimize(run, start)
    with torch.no_grad():
        if options["em_iterations"]:
            mixture, how = _likelier_by_em(run, first, mixture, how)
        if options["merge"] is not None:
            mixture = _merge(run, mixture)
    fitted = of_mixture(mixture, run.data, run.n_clusters, how)
    return replace(fitted, note=fewer("components", n_components, run.n_components))


def _refined(run: Run) -> Fitted:
    """The components of the extracted CPMM, trained on free of their trajectories."""
    if run.extracted is None:
        raise ValueError(
            f"baseline {run.row} starts from the mixture that the pipeline extracts, and a trial "
            "has none: choose another model"
        )
    free = run.extracted.components.to(torch.float32)
    free = replace(free, log_diagonal=free.log_diagonal.clamp(min=run.floor + 1e-3))
    mixture, how = _optimize(run, DirectMixture(free, run.floor, run.extracted.cluster_sizes))
    return of_mixture(mixture, run.data, run.n_clusters, how)


def _optimize(run: Run, start: DirectMixture) -> tuple[Mixture, Mapping[str, int | None]]:
    """Train free components on the likelihood of the data; the best epoch by validation."""
    steps = pick(run.section, "noise", "learning_rate", "n_warmup_epochs")
    curriculum = Curriculum(0, 0, run.section["epochs"])
    module = MixtureTraining(start, curriculum, MixtureOptions(**steps, seed=run.seed))
    run.fit(module, run.draws())
    with torch.no_grad():
        return module.model.cpu().mixture(), ended(module)


def _likelier_by_em(
    run: Run, start: Mixture, by_gradient: Mixture, how: Mapping[str, int | None]
) -> tuple[Mixture, Mapping[str, int | None]]:
    """Fit by EM from the same start; the better by validation likelihood, and how it ended."""
    from cpmm.expectation_maximization import fit_by_em

    try:
        found = fit_by_em(
            start.components.to(torch.float64), run.train.double(), run.validation.double(),
            run.floor, run.section["em_iterations"], patience=5, batch_size=2048,
            listener=lambda _: run.alive(),
        )  # fmt: skip
    except FloatingPointError as error:
        print(f"baseline {run.row} | EM gave up, Adam's is taken: {error}", flush=True)
        return by_gradient, how
    by_em = Mixture(found.best.to(torch.float32), start.cluster_sizes)
    adam, em = (float(found.log_prob(run.validation).mean()) for found in (by_gradient, by_em))
    if not run.options.get("quiet"):
        said = f"validation, nats per point: Adam {adam:.3f}, EM {em:.3f}"
        print(f"baseline {run.row} | {said}", flush=True)
    if em <= adam:
        return by_gradient, how
    return by_em, {"best_epoch": found.best_iteration, "steps": len(found.history) - 1}


def _curriculum(run: Run) -> Fitted:
    """CPMM's own training of components that no trajectory connects."""
    from cpmm.pipeline.models.mixtures import make_disconnected, make_mixture_training

    cpmm = {**run.config["cpmm"], "path_weight": 0.0}
    n_each = run.config["mixture"]["n_pseudotimes"]

    def make_model(*arguments: Any) -> nn.Module:
        return make_disconnected(*arguments, n_each=n_each, shrinkage=run.section["shrinkage"])

    options = run.config["mixture"]
    module, rows = make_mixture_training(cpmm, options, run.data, run.spaces, make_model)
    run.fit(module, rows)
    with torch.no_grad():
        mixture = module.model.cpu().mixture()
    fitted = of_mixture(mixture, run.data, run.n_clusters, ended(module))
    n_all = run.n_clusters * n_each
    return replace(fitted, note=fewer("components", fitted.n_components or 0, n_all))


def _require_images(run: Run, section: str) -> None:
    if run.section[section]["kind"] == "conv" and run.data.image_shape is None:
        raise ValueError(
            f"baselines.{run.row}.{section}.kind is 'conv', but the data are no images: choose mlp"
        )


def _continuous(run: Run) -> Fitted:
    """A continuous mixture, whose integration points are merged into C clusters."""
    from cpmm.baselines.continuous import ContinuousMixture, ConvDecoder, MLPDecoder, initial_state

    options, data = run.section, run.data
    _require_images(run, "decoder")
    plain = {"augmentation": 0, "diagonal": "variable", "learned_weight": False}
    layout = make_layout(run.config["cpmm"] | plain, data)
    n_latent, decoder = options["n_latent"], options["decoder"]
    with seeded(run.seed, 42):
        if decoder["kind"] == "mlp":
            sizes = pick(decoder, "width", "depth", "activation", "n_frequencies")
            network = MLPDecoder(n_latent, layout.size, **sizes)
        else:
            channels, height, width = data.image_shape
            sizes = pick(decoder, "width", "n_doublings", "activation", "n_frequencies")
            network = ConvDecoder(n_latent, (layout.n_maps * channels, height, width), **sizes)
    start = initial_state(layout, run.train, run.generator(43))
    n_points = options["n_integration_points"]
    model = ContinuousMixture(network, layout, start, n_latent, n_points, run.n_components)
    how = run.fit_loss(model, run.draws())
    with torch.no_grad():
        mixture = _merge(run, model.extract(run.n_components, separate=True))
    return of_mixture(mixture, run.data, run.n_clusters, how)


def _einet(run: Run) -> Fitted:
    """An einsum network of as many parameters as the extracted CPMM has, or a multiple of them."""
    from cpmm.baselines.einet import EinsumNetwork

    options, data = run.section, run.data
    of_each = data.n_features * (run.n_factors + 2) + 1  # means, loadings, log d, weight
    size = n_all = round(options["size_factor"] * (run.n_components * of_each))
    generator = run.generator(44)

    def make(size: int) -> EinsumNetwork:
        return EinsumNetwork.of_size(
            size, data.n_features, data.image_shape, options["n_replicas"], run.floor, generator,
            options["depth"],
        )  # fmt: skip

    network, note = make(size), None
    while max(network.n_leaves, network.n_sums) > len(run.train):
        size //= 2
        network = make(size)
        note = (
            f"{network.n_parameters} parameters in place of {n_all}: a region has no more "
            "components than there are training points"
        )
    network.initialize(run.train, generator)
    how = run.fit_loss(network, run.draws())
    weights = {name: value.clone() for name, value in network.state_dict().items()}  # as trained
    log_prob = network.double().log_prob
    return Fitted(network.n_parameters, how, log_prob=log_prob, weights=weights, note=note)


def _flow(run: Run) -> Fitted:
    """A continuous normalizing flow with options of its own, those of the section ``teacher``."""
    from cpmm.odes import Solver
    from cpmm.pipeline.models.flows import flow_log_prob, make_teacher
    from cpmm.training.teacher import TeacherTraining

    options, evaluation = run.section, run.config["evaluation"]
    _require_images(run, "field")
    flow = make_teacher(options, run.data, run.seed, f"baselines.{run.row}")
    reported, flow.trace = flow.trace, "hutchinson"  # which training needs no more than
    module = TeacherTraining(
        flow,
        **pick(
            options, "flow_matching_epochs", "likelihood_epochs", "kinetic_weight",
            "jacobian_weight", "learning_rate", "n_warmup_epochs",
        ),
        seed=run.seed,
    )  # fmt: skip
    run.fit(module, run.draws())
    flow.cpu().float().eval()
    weights = {name: value.clone() for name, value in flow.state_dict().items()}
    device = compute_device(run.config["trainer"], exact=True)
    flow.to(device)
    flow.trace = reported
    flow.solver = Solver(**evaluation["teacher_solver"], name="evaluation.teacher_solver")

    title = None if run.options.get("quiet") else f"baseline {run.row}"

    def log_prob(z: Tensor) -> Tensor:
        generator = seeded_generator(run.seed, 45, device=device)
        return flow_log_prob(flow, z, generator, evaluation["batch_size"], title, alive=run.alive)

    n_parameters, n_points = _n_parameters(flow), evaluation["teacher_points"]
    return Fitted(n_parameters, ended(module), log_prob, weights=weights, n_points=n_points)


def _n_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _grey(run: Run) -> tuple[Callable[[str], Tensor], str]:
    """Points as autoencoders take them: grey levels in [0, 1], or a table's own space."""
    data, levels = run.data, run.data.preprocessing.levels
    if levels is None or run.section["likelihood"] == "gaussian":
        return lambda split: data.points(split)[0].float(), "gaussian"
    return lambda split: data.raw[split].float() / (levels - 1), "bernoulli"


def _fit_autoencoder(run: Run, first: str | None) -> tuple[Any, Any, Callable[[str], Tensor]]:
    from cpmm.baselines.autoencoder import Autoencoder

    options = run.section
    points, likelihood = _grey(run)
    if likelihood == "bernoulli" and options["noise"]:
        raise ValueError(
            f"baselines.{run.row}.noise is {options['noise']}: expected 0, as the Bernoulli "
            "likelihood needs grey levels in [0, 1]: set it to 0, or "
            f"baselines.{run.row}.likelihood=gaussian"
        )
    model = Autoencoder(
        run.data.n_features, options["hidden"], options["code_size"], likelihood, run.generator(46)
    )
    steps = pick(options, "noise", "learning_rate", "n_warmup_epochs")
    n_epochs = options["autoencoder_epochs"]
    module = LossTraining(model, n_epochs, **steps, seed=run.seed, density=False)
    run.fit(module, run.same(points), first)
    return model.cpu().float().eval(), module, points


def _autoencoder(run: Run) -> Fitted:
    """An autoencoder, and k-means on its codes."""
    model, module, points = _fit_autoencoder(run, first=None)
    n_starts = run.section["n_starts"]
    clusters, n = as_many(
        lambda c: model.cluster(points("train"), c, run.generator(47), n_starts), run.n_clusters
    )
    weights = clusters.state_dict()
    n_parameters = sum(value.numel() for value in weights.values())
    return Fitted(
        n_parameters, ended(module), predict=lambda split: clusters.predict(points(split)),
        weights=weights, note=fewer("clusters", n, run.n_clusters),
    )  # fmt: skip


def _vade(run: Run) -> Fitted:
    """VaDE, from a trained autoencoder and a mixture of Gaussians fitted to its codes."""
    from cpmm.baselines.vade import VaDE

    autoencoder, _, points = _fit_autoencoder(run, first="autoencoder")
    x, n_starts = points("train"), run.section["n_starts"]
    model, n = as_many(
        lambda c: VaDE.from_autoencoder(autoencoder, x, c, run.generator(48), n_init=n_starts),
        run.n_clusters,
    )
    how = run.fit_loss(model, run.same(points), density=False)
    return Fitted(
        _n_parameters(model), how, predict=lambda split: model.predict(points(split)),
        weights=model.state_dict(), note=fewer("clusters", n, run.n_clusters),
    )  # fmt: skip


def _gaussian(run: Run) -> Fitted:
    """One Gaussian with a full covariance, in closed form; shrunk where that is singular."""
    from cpmm.baselines.gaussian import fit_full_gaussian, fit_shrunk_gaussian

    x, note = run.train, None
    try:
        if len(x) <= run.data.n_features:  # the noise of the draws would hide it
            raise ValueError(f"{len(x)} training points do not span {run.data.n_features} features")
        gaussian = fit_full_gaussian(run.data.draw(run.section["n_draws"], run.generator(32)))
    except ValueError as error:
        gaussian, share = fit_shrunk_gaussian(x)
        note = f"covariance shrunk by {100 * share:.2g} % (Ledoit-Wolf): {error}"
    weights = {"mean": gaussian.loc, "scale_tril": gaussian.scale_tril}
    return replace(of_gaussian(weights, run.data), note=note)


def _sklearn(run: Run) -> Fitted:
    """scikit-learn's GaussianMixture; how much it adds to its variances is chosen by validation."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    options, data, n_points = run.section, run.data, run.section["n_points"]
    if n_points is not None and n_points < run.n_clusters:
        raise ValueError(
            f"baselines.{run.row}.n_points is {n_points}: expected at least {run.n_clusters}, the "
            "clusters (cpmm.n_clusters): raise it, or set null for all training points"
        )
    x = run.train.double()
    if n_points is not None and n_points < len(x):
        x = x[torch.randperm(len(x), generator=run.generator(49))[:n_points]]
    validation = data.points("validation")[0].numpy()
    c = count_distinct(x, run.n_clusters)
    models = [
        GaussianMixture(
            c, covariance_type=options["covariance"], reg_covar=added,
            max_iter=options["n_iterations"], tol=options["tolerance"], random_state=run.seed,
        )
        for added in options["added_variances"]
    ]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the best iterate is taken as it is
        best = max((m.fit(x.numpy()) for m in models), key=lambda model: model.score(validation))
    m = data.n_features
    of_each = {"full": m * (m + 1) // 2, "diag": m}[options["covariance"]]
    weights = {"weights": best.weights_, "means": best.means_, "covariances": best.covariances_}
    return Fitted(
        c * (m + of_each) + c,
        NOT_TRAINED,
        log_prob=lambda z: torch.from_numpy(best.score_samples(z.numpy())),
        predict=lambda split: torch.from_numpy(best.predict(data.points(split)[0].numpy())),
        weights={name: torch.from_numpy(value) for name, value in weights.items()},
        note=fewer("clusters", c, run.n_clusters),
    )


def _kmeans(run: Run) -> Fitted:
    """k-means in the models' space, before any whitening."""
    import warnings

    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    points = run.data.preprocessing.unwhiten(run.data.points("train")[0])
    c = count_distinct(points, run.n_clusters)
    model = KMeans(c, n_init=run.section["n_starts"], random_state=run.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of points that are all but the same
        model.fit(points.numpy())
    fitted = of_kmeans({"centre": torch.from_numpy(model.cluster_centers_)}, run.data)
    return replace(fitted, note=fewer("clusters", c, run.n_clusters))


def _groups(run: Run) -> Fitted:
    """The groups of training points that initialize the trajectories."""
    group = make_groups(run.config["cpmm"], run.data)
    if group is None:
        kind = run.config["cpmm"]["initialization"]["kind"]
        return Fitted(None, NOT_TRAINED, missing=f"an initialization of kind {kind!r} makes none")
    return of_groups({"group": group}, run.data)


KINDS: dict[str, Callable[[Run], Fitted]] = {
    "direct": _direct,
    "refined": _refined,
    "curriculum": _curriculum,
    "continuous": _continuous,
    "einet": _einet,
    "flow": _flow,
    "autoencoder": _autoencoder,
    "vade": _vade,
    "gaussian": _gaussian,
    "sklearn": _sklearn,
    "kmeans": _kmeans,
    "groups": _groups,
}
