"""Training loops on Lightning: the teacher's, and that of every mixture fitted by gradient ascent.

Everything random in an epoch comes from generators seeded by the run's seed and the epoch, so that
a run resumed at an epoch's end goes on exactly as if it had never stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from cpmm.mixture import Mixture
from cpmm.seeds import seeded_generator
from cpmm.spaces import Curriculum
from cpmm.teacher import Flow, flow_matching_loss
from cpmm.trajectory import draw_pseudotimes, pseudotime_grid


class Rows(Dataset):
    """Tensors of N rows that stay together, by name; an index is a list of rows, a whole batch."""

    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        """N."""
        return len(self.tensors["x"])

    def __getitem__(self, index: list[int]) -> dict[str, Tensor]:
        """Rows of each tensor."""
        return {name: tensor[index] for name, tensor in self.tensors.items()}

    def to(self, device: torch.device) -> Rows:
        """Move all rows to a device at once, where they are not there already."""
        return Rows(**{name: tensor.to(device) for name, tensor in self.tensors.items()})


class EpochData(pl.LightningDataModule):
    """Batches of rows that are made anew for every epoch; the trainer must reload each epoch.

    A GPU gets all rows of an epoch at once, and those of the next are made while it computes: it would
    wait for the CPU more than half of the time.

    Args:
        rows: Gives the training rows of an epoch from the epoch and a generator: points ``x``, (N,
            M), and what the module knows to use beside them.
        validation_rows: Gives the validation rows of an epoch, (N, M).
        batch_size: Rows of a batch.
        seed: Of the order of rows and what ``rows`` draws.
        n_rows: How many training rows an epoch has, without making them: the steps to come are told by it.
    """

    def __init__(
        self,
        rows: Callable[[int, torch.Generator], Rows],
        validation_rows: Callable[[int], Tensor],
        batch_size: int,
        seed: int,
        n_rows: Callable[[int], int],
    ) -> None:
        super().__init__()
        self.rows = rows
        self.validation_rows = validation_rows
        self.n_rows = n_rows
        self.batch_size = batch_size
        self.seed = seed
        self._ahead: dict[int, Future[tuple[Rows, torch.Generator]]] = {}
        self._thread = ThreadPoolExecutor(1)

    def train_dataloader(self) -> DataLoader:
        """Batches of the current epoch, shuffled."""
        epoch, device = self.trainer.current_epoch, self._device
        ahead = self._ahead.pop(epoch, None)
        data, generator = self._make(epoch) if ahead is None else ahead.result()
        if device.type != "cpu" and epoch + 1 < self.trainer.max_epochs:
            self._ahead = {epoch + 1: self._thread.submit(self._make, epoch + 1)}
        data = data.to(device)
        order = RandomSampler(data, generator=generator)
        batches = BatchSampler(order, self.batch_size, False)
        return DataLoader(data, sampler=self._share(batches), batch_size=None)

    def val_dataloader(self) -> DataLoader:
        """Validation rows, in order."""
        data = Rows(x=self.validation_rows(self.trainer.current_epoch)).to(self._device)
        batches = BatchSampler(range(len(data)), 4 * self.batch_size, False)
        return DataLoader(data, sampler=self._share(batches), batch_size=None)

    @property
    def n_steps(self) -> int:
        """Steps of the whole run."""
        return sum(self._n_batches(self.n_rows(epoch)) for epoch in range(self.trainer.max_epochs))

    def _n_batches(self, n_rows: int) -> int:
        full, rest = divmod(n_rows, self.batch_size)
        return full + (rest >= self.trainer.world_size)

    @property
    def _device(self) -> torch.device:
        return self.trainer.strategy.root_device

    def _make(self, epoch: int) -> tuple[Rows, torch.Generator]:
        """Rows of an epoch, and the generator of their order."""
        generator = seeded_generator(self.seed, 0, epoch)
        return self.rows(epoch, generator), generator

    def _share(self, batches: BatchSampler) -> Iterable[list[int]]:
        """Leave of each batch the part of this process, if several train the model together."""
        rank, size = self.trainer.global_rank, self.trainer.world_size
        if size == 1:
            return batches
        # A batch smaller than the number of processes would leave one of them without points.
        return [batch[rank::size] for batch in batches if len(batch) >= size]


class Recorded(pl.LightningModule):
    """What both loops share: the history by epoch, the best weights by validation, the schedule.

    Args:
        model: What is trained.
        learning_rate: Adam's.
        n_epochs: Epochs of the run, for the schedule.
        n_constant_epochs: Epochs before the cosine decay to a hundredth begins.
        n_warmup_epochs: Epochs of linear warm-up.
        seed: Of every draw.
    """

    def __init__(
        self,
        model: nn.Module,
        learning_rate: float,
        n_epochs: int,
        n_constant_epochs: int,
        n_warmup_epochs: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.model = model
        self.learning_rate = learning_rate
        self.n_epochs = n_epochs
        self.n_constant_epochs = n_constant_epochs
        self.n_warmup_epochs = n_warmup_epochs
        self.seed = seed
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Any] = {"value": math.inf, "epoch": -1, "weights": None}
        self.listeners: list[Callable[[Recorded], None]] = []
        self.seconds_before = 0.0  # of the training, in processes that ended early
        self._started = time.monotonic()
        self._sums: dict[str, Tensor] = {}

    def configure_optimizers(self) -> dict:
        """Adam, warmed up, constant, then decayed along a cosine."""
        optimizer = torch.optim.Adam(self.parameter_groups(), lr=self.learning_rate)

        def factor(epoch: int) -> float:
            warm = min(1.0, (epoch + 1) / (self.n_warmup_epochs + 1))
            tail = max(1, self.n_epochs - self.n_constant_epochs)
            position = min(1.0, max(0, epoch - self.n_constant_epochs) / tail)
            return warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * position)))

        return {
            "optimizer": optimizer,
            "lr_scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, factor),
        }

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameters by learning rate."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def on_train_epoch_start(self) -> None:
        """Seed the epoch's draws, those of each process by its rank."""
        stream = (1, self.current_epoch, *([self.global_rank] if self.global_rank else []))
        self._generator = seeded_generator(self.seed, *stream, device=self.device)
        self._sums = {}

    def on_train_epoch_end(self) -> None:
        """Record the epoch, keep the weights if they are the best yet, and tell the listeners."""
        row = {"epoch": self.current_epoch, "step": self.global_step, **self.describe_epoch()}
        for name, total in self._sums.items():
            if self.trainer.world_size > 1:
                torch.distributed.all_reduce(total)
            row[name] = float(total[0] / total[1])
        self.history.append(row)
        value = row.get("validation", math.inf)
        if math.isnan(value):
            with self.located():
                raise FloatingPointError(
                    "the validation loss is NaN: lower the learning rate or the gradient clip"
                )
        if self.is_candidate() and value < self.best["value"]:
            weights = {k: v.detach().cpu().clone() for k, v in self.model.state_dict().items()}
            self.best = {"value": value, "epoch": self.current_epoch, "weights": weights}
        for listener in self.listeners:
            listener(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the history, the best weights and the time spent with Lightning's own state."""
        seconds = self.seconds_before + time.monotonic() - self._started
        checkpoint |= {"history": self.history, "best": self.best, "seconds": seconds}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them back."""
        self.history, self.best = checkpoint["history"], checkpoint["best"]
        self.seconds_before = checkpoint["seconds"]

    @property
    def n_steps(self) -> int:
        """Steps of the whole run, while a trainer runs it."""
        return self.trainer.datamodule.n_steps

    def restore_best(self) -> None:
        """Load the best weights into the model; the last ones stay if none was a candidate."""
        if self.best["weights"] is not None:
            self.model.load_state_dict(self.best["weights"])

    def best_summary(self) -> dict[str, float | int | None]:
        """Where the best weights come from, for the header of an artifact; None: the last ones."""
        if self.best["weights"] is None:
            return {"validation": None, "epoch": None}
        return {"validation": self.best["value"], "epoch": self.best["epoch"]}

    def describe_epoch(self) -> dict[str, float]:
        """Columns of the history beside the losses."""
        return {}

    def describe_phase(self) -> str:
        """Say for the progress line what is being trained on."""
        return f"epoch {self.current_epoch + 1}/{self.n_epochs}"

    def is_candidate(self) -> bool:
        """Whether the weights of this epoch may be chosen by their validation loss."""
        return True

    def measures_density(self, epoch: int) -> bool:
        """Whether the losses of an epoch are nats per dimension of the input space."""
        return True

    @contextmanager
    def located(self) -> Iterator[None]:
        """Let an error of broken numbers say where in the run it happened."""
        try:
            yield
        except FloatingPointError as error:
            where = f"{self.describe_phase()}, step {self.global_step}"
            raise FloatingPointError(f"{error} ({where})") from error

    def _record(self, name: str, value: Tensor, weight: int) -> None:
        total = self._sums.setdefault(name, value.new_zeros(2, dtype=torch.float64))
        total += torch.stack([value.detach().double() * weight, total.new_tensor(weight)])


class TeacherTraining(Recorded):
    """Train a flow by flow matching, by maximum likelihood, or by one after the other.

    Args:
        flow: The teacher.
        flow_matching_epochs: Epochs of flow matching, first.
        likelihood_epochs: Epochs of maximum likelihood after them.
        kinetic_weight: Weight of the kinetic cost beside the likelihood (RNODE).
        jacobian_weight: Weight of the Jacobian cost beside the likelihood.
        learning_rate: Adam's.
        n_warmup_epochs: Epochs of linear warm-up.
        seed: Of every draw.
    """

    def __init__(
        self,
        flow: Flow,
        flow_matching_epochs: int,
        likelihood_epochs: int,
        kinetic_weight: float,
        jacobian_weight: float,
        learning_rate: float,
        n_warmup_epochs: int,
        seed: int,
    ) -> None:
        n_epochs = flow_matching_epochs + likelihood_epochs
        if n_epochs < 1:
            raise ValueError("the teacher needs at least one epoch of flow matching or likelihood")
        super().__init__(flow, learning_rate, n_epochs, n_epochs // 2, n_warmup_epochs, seed)
        self.flow_matching_epochs = flow_matching_epochs
        self.kinetic_weight = kinetic_weight
        self.jacobian_weight = jacobian_weight

    def describe_epoch(self) -> dict[str, float]:
        """Which objective the epoch had: 0 flow matching, 1 likelihood."""
        return {"objective": float(self.current_epoch >= self.flow_matching_epochs)}

    def measures_density(self, epoch: int) -> bool:
        """The error of flow matching does not; a likelihood does, but for its regularization."""
        return epoch >= self.flow_matching_epochs

    def is_candidate(self) -> bool:
        """Losses of the two objectives cannot be compared: only those of the last one count."""
        last_is_likelihood = self.n_epochs > self.flow_matching_epochs
        return (self.current_epoch >= self.flow_matching_epochs) == last_is_likelihood

    def loss(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Loss of the current objective: squared error, or nats per dimension."""
        if self.current_epoch < self.flow_matching_epochs:
            return flow_matching_loss(self.model.field, x, generator)
        log_prob, kinetic, jacobian = self.model.log_prob_and_costs(x, generator)
        costs = self.kinetic_weight * kinetic + self.jacobian_weight * jacobian
        return (-log_prob / x.shape[1] + costs).mean()

    def training_step(self, batch: Mapping[str, Tensor], batch_index: int) -> Tensor:
        """One step of the current objective."""
        with self.located():
            loss = self.loss(batch["x"], self._generator)
            if not bool(torch.isfinite(loss)):
                raise FloatingPointError(
                    f"the teacher's loss is {loss.item()}: lower teacher.learning_rate or "
                    "teacher.gradient_clip"
                )
        self._record("train", loss, len(batch["x"]))
        return loss

    def on_validation_epoch_start(self) -> None:
        """The same draws for every validation, so that epochs can be compared."""
        self._validation_generator = seeded_generator(self.seed, 2, device=self.device)

    def validation_step(self, batch: Mapping[str, Tensor], batch_index: int) -> None:
        """Loss of held-out rows."""
        with self.located():
            loss = self.loss(batch["x"], self._validation_generator)
        self._record("validation", loss, len(batch["x"]))


class HasLoss(Protocol):
    """A model of points that is neither a flow nor a mixture on trajectories."""

    def loss(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Loss of points, (N, M), a scalar: nats per dimension where the model is a density."""


class LossTraining(Recorded):
    """Minimize a model's own loss on training points: the baselines that gradients train.

    Args:
        model: States its loss.
        n_epochs: Of the run; the rate decays over its second half.
        noise: Deviation of the Gaussian noise added to training points.
        learning_rate: Adam's.
        n_warmup_epochs: Epochs of linear warm-up.
        seed: Of every draw.
        density: Whether the loss is a density's, in nats per dimension of the points' space.
    """

    def __init__(
        self,
        model: HasLoss,
        n_epochs: int,
        noise: float,
        learning_rate: float,
        n_warmup_epochs: int,
        seed: int,
        density: bool = True,
    ) -> None:
        super().__init__(model, learning_rate, n_epochs, n_epochs // 2, n_warmup_epochs, seed)
        self.noise = noise
        self.density = density

    def measures_density(self, epoch: int) -> bool:
        """Only what has a density does."""
        return self.density

    def training_step(self, batch: Mapping[str, Tensor], batch_index: int) -> Tensor:
        """One step down the loss."""
        x = batch["x"]
        if self.noise:
            x = x + self.noise * torch.randn(x.shape, generator=self._generator, device=x.device)
        with self.located():
            loss = self.model.loss(x, self._generator)
            if not bool(torch.isfinite(loss)):
                raise FloatingPointError(
                    f"the loss is {loss.item()}: lower the learning rate or the gradient clip"
                )
        self._record("train", loss, len(x))
        return loss

    def on_validation_epoch_start(self) -> None:
        """The same draws for every validation, so that epochs can be compared."""
        self._validation_generator = seeded_generator(self.seed, 2, device=self.device)

    def validation_step(self, batch: Mapping[str, Tensor], batch_index: int) -> None:
        """Loss of held-out rows, without noise."""
        with self.located():
            loss = self.model.loss(batch["x"], self._validation_generator)
        self._record("validation", loss, len(batch["x"]))


def path_cost(mixture: Mixture, times: Tensor | None = None) -> Tensor:
    r"""Kinetic cost of the means, straight between pseudotimes, averaged over the trajectories.

    .. math:: \frac{1}{C M} \sum_c \int \|d \mu_c / dt\|^2 dt

    Args:
        mixture: Its clusters are trajectories at G pseudotimes.
        times: These pseudotimes, ascending, (G,); None if they go evenly from 0 to 1.
    """
    means = mixture.components.mean.split(mixture.cluster_sizes)
    if times is None:
        costs = [
            (mean.diff(dim=0).square().sum(0) * max(1, len(mean) - 1)).mean() for mean in means
        ]
    else:
        step = times.diff()[:, None].clamp(min=1e-6)
        costs = [(mean.diff(dim=0).square() / step).sum(0).mean() for mean in means]
    return torch.stack(costs).mean()


def posterior_disagreement(own: Tensor, seen: Tensor, temperature: float) -> Tensor:
    r"""How far the clusters' posterior of points is from that of their views.

    .. math:: \frac{1}{2 N} \sum_n KL(p_n \| q_n) + KL(q_n \| p_n), \quad
        p_n \propto \exp(\log \eta_c p(x_n | c) / T)

    with q of the views. At T = 1 posteriors in hundreds of dimensions are zero or one, and their
    gradients nothing or huge.

    Args:
        own: Log of weight times density of the points, nats, (N, C).
        seen: The same of their views.
        temperature: T, in nats.

    Returns:
        Nats, a scalar.
    """
    p, q = (own / temperature).log_softmax(1), (seen / temperature).log_softmax(1)
    return 0.5 * ((p.exp() - q.exp()) * (p - q)).sum(1).mean()


class HasMixture(Protocol):
    """Trajectories, or a direct mixture."""

    def mixture(self, times: Tensor) -> Mixture:
        """Return the mixture at the pseudotimes ``times``."""


class MixtureTraining(Recorded):
    """Train a mixture by maximum likelihood through a curriculum of spaces (section 3.3).

    Args:
        model: The trajectories, or a direct mixture.
        curriculum: Which space each epoch trains on.
        pseudo_label_spaces: In so many first spaces a trajectory is told which points are its own, those of
            its group, and maximizes the likelihood of points and groups; afterwards that of points.
        pseudo_label_weight: Weight, afterwards, of the cross-entropy of the groups under the clusters'
            posterior at ``temperature``.
        n_pseudotimes: G of a training step.
        pseudotimes: How they are chosen, see :func:`draw_pseudotimes`.
        n_extracted: G at validation: that of the extracted mixture.
        noise: Deviation of the Gaussian noise added to training points (0.01 in the paper).
        entropy_weight: Weight of the entropy of the clusters' mean responsibilities, nats.
        path_weight: Weight of the kinetic cost of the means, see :func:`path_cost`; keeps a
            trajectory from wandering over several groups of the data.
        consistency_weight: Weight of :func:`posterior_disagreement` between points and their views.
        temperature: Of the posteriors in both, nats.
        learning_rate: Adam's.
        initial_rate_factor: The initial states' learning rate in units of the field's.
        n_warmup_epochs: Epochs of linear warm-up.
        seed: Of every draw.
    """

    def __init__(
        self,
        model: HasMixture,
        curriculum: Curriculum,
        pseudo_label_spaces: int,
        pseudo_label_weight: float,
        n_pseudotimes: int,
        pseudotimes: str,
        n_extracted: int,
        noise: float,
        entropy_weight: float,
        path_weight: float,
        consistency_weight: float,
        temperature: float,
        learning_rate: float,
        initial_rate_factor: float,
        n_warmup_epochs: int,
        seed: int,
    ) -> None:
        super().__init__(
            model,
            learning_rate,
            curriculum.n_epochs,
            curriculum.n_guided_epochs,
            n_warmup_epochs,
            seed,
        )
        self.path_weight = path_weight
        self.consistency_weight = consistency_weight
        self.temperature = temperature
        self.initial_rate_factor = initial_rate_factor
        self.curriculum = curriculum
        self.pseudo_label_epochs = (
            min(pseudo_label_spaces, curriculum.n_spaces) * curriculum.epochs_per_space
        )
        self.pseudo_label_weight = pseudo_label_weight
        self.n_pseudotimes = n_pseudotimes
        self.pseudotimes = pseudotimes
        self.n_extracted = n_extracted
        self.noise = noise
        self.entropy_weight = entropy_weight

    def describe_epoch(self) -> dict[str, float]:
        """Index of the epoch's space, V while fine-tuning."""
        space = self.curriculum.space(self.current_epoch)
        return {"space": float(self.curriculum.n_spaces if space is None else space)}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The initial states may learn faster than the field: they carry whole trajectories."""
        fast = [p for name, p in self.model.named_parameters() if name == "initial"]
        slow = [
            p for name, p in self.model.named_parameters() if name != "initial" and p.requires_grad
        ]
        groups = [{"params": slow}]
        if fast:
            groups.append({"params": fast, "lr": self.learning_rate * self.initial_rate_factor})
        return groups

    def describe_phase(self) -> str:
        """Say which space is being trained on."""
        space = self.curriculum.space(self.current_epoch)
        if space is None:
            return "fine-tuning"
        return f"space {space + 1}/{self.curriculum.n_spaces}"

    def is_candidate(self) -> bool:
        """Only weights trained on the input space may be chosen."""
        return self.measures_density(self.current_epoch)

    def measures_density(self, epoch: int) -> bool:
        """In the spaces of a curriculum a likelihood says nothing of the data's density."""
        return self.curriculum.space(epoch) is None

    def training_step(self, batch: Mapping[str, Tensor], batch_index: int) -> Tensor:
        """One step up the likelihood.

        A batch holds points ``x``; if they are told, their ``group``; and for the consistency, if it
        has a weight, a ``view`` of each.
        """
        x = batch["x"]
        if self.noise:
            x = x + self.noise * torch.randn(x.shape, generator=self._generator, device=x.device)
        times = draw_pseudotimes(self.pseudotimes, self.n_pseudotimes, self._generator)
        with self.located():
            mixture = self.model.mixture(times.to(x))
            by_cluster = mixture.cluster_joint_log_prob(x)
            log_prob = by_cluster.logsumexp(1)
            told = self.current_epoch < self.pseudo_label_epochs
            if told:  # of points and groups
                log_prob = by_cluster.gather(1, batch["group"][:, None]).squeeze(1)
            loss = -log_prob.mean() / x.shape[1]
            if not bool(torch.isfinite(loss)):
                raise FloatingPointError(self._diagnosis(log_prob, mixture))
        self._record("train", loss, len(x))
        if self.entropy_weight:
            share = by_cluster.log_softmax(1).logsumexp(0) - math.log(len(x))
            entropy = -(share.exp() * share).sum()
            loss = loss - self.entropy_weight * entropy
        if self.path_weight:
            drawn = None if self.pseudotimes == "grid" else times.to(x)
            loss = loss + self.path_weight * path_cost(mixture, drawn)
        if "group" in batch and not told:
            cross_entropy = nn.functional.cross_entropy(
                by_cluster / self.temperature, batch["group"]
            )
            self._record("cross_entropy", cross_entropy, len(x))
            loss = loss + self.pseudo_label_weight * cross_entropy
        if "view" in batch:
            seen = mixture.cluster_joint_log_prob(batch["view"])
            disagreement = posterior_disagreement(by_cluster, seen, self.temperature)
            self._record("disagreement", disagreement, len(x))
            loss = loss + self.consistency_weight * disagreement
        return loss

    def on_validation_epoch_start(self) -> None:
        """Solve the ODE once for all validation rows."""
        like = next(iter(self.model.parameters()))
        with self.located():
            self._mixture = self.model.mixture(pseudotime_grid(self.n_extracted, like))

    def validation_step(self, batch: Mapping[str, Tensor], batch_index: int) -> None:
        """Nats per dimension of held-out rows, without noise."""
        x = batch["x"]
        with self.located():
            log_prob = self._mixture.log_prob(x)
        self._record("validation", -log_prob.mean() / x.shape[1], len(x))

    def _diagnosis(self, log_prob: Tensor, mixture: Mixture) -> str:
        fa = mixture.components
        broken = [name for name, value in vars(fa).items() if not bool(torch.isfinite(value).all())]
        cause = f"{', '.join(broken)} not finite"
        if not broken:
            cause = (
                f"smallest diagonal variance {fa.log_diagonal.min().exp().item():.2g}, largest "
                f"mean {fa.mean.abs().max().item():.2g}"
            )
        bad = int((~torch.isfinite(log_prob)).sum())
        return (
            f"{bad} of {len(log_prob)} log-densities are not finite; {cause}: lower "
            "cpmm.learning_rate or cpmm.gradient_clip, or raise cpmm.log_diagonal_floor"
        )
