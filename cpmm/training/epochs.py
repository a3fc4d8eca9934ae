"""What all training loops share, on Lightning: batches made anew for every epoch, and the record.

Everything random in an epoch comes from generators seeded by the run's seed and the epoch, so that
a run resumed at an epoch's end goes on exactly as if it had never stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from cpmm.seeds import seeded_generator

if TYPE_CHECKING:
    from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig


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

    A GPU gets all rows of an epoch at once. Those of the next epoch are made while it computes, or
    it would wait for the CPU more than half of the time.

    Args:
        rows: Gives the training rows of an epoch from the epoch and a generator: points ``x``, (N,
            M), and what the module knows to use beside them.
        validation_rows: Gives the validation rows of an epoch, (N, M).
        batch_size: Rows of a batch.
        seed: Seed of the order of rows and of what ``rows`` draws.
        n_rows: Gives the number of training rows of an epoch without making them; the number of
            steps to come follows from it.
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
        self.rows, self.validation_rows, self.n_rows = rows, validation_rows, n_rows
        self.batch_size, self.seed = batch_size, seed
        self._ahead: dict[int, Future[tuple[Rows, torch.Generator]]] = {}
        self._thread = ThreadPoolExecutor(1)

    def train_dataloader(self) -> DataLoader:
        """Batches of the current epoch, shuffled."""
        epoch, device = self._run.current_epoch, self._device
        ahead = self._ahead.pop(epoch, None)
        data, generator = self._make(epoch) if ahead is None else ahead.result()
        if device.type != "cpu" and epoch + 1 < self.n_epochs:
            self._ahead = {epoch + 1: self._thread.submit(self._make, epoch + 1)}
        data = data.to(device)
        order = RandomSampler(data, generator=generator)
        batches = BatchSampler(order, self.batch_size, False)
        return DataLoader(data, sampler=self._share(batches), batch_size=None)

    def val_dataloader(self) -> DataLoader:
        """Validation rows, in order."""
        data = Rows(x=self.validation_rows(self._run.current_epoch)).to(self._device)
        batches = BatchSampler(range(len(data)), 4 * self.batch_size, False)
        return DataLoader(data, sampler=self._share(batches), batch_size=None)

    @property
    def n_epochs(self) -> int:
        """Epochs of the whole run."""
        n_epochs = self._run.max_epochs
        assert n_epochs is not None
        return n_epochs

    @property
    def n_steps(self) -> int:
        """Steps of the whole run."""
        parts = (divmod(self.n_rows(epoch), self.batch_size) for epoch in range(self.n_epochs))
        return sum(full + (rest >= self._run.world_size) for full, rest in parts)

    @property
    def _run(self) -> pl.Trainer:
        assert self.trainer is not None  # Lightning has set it before it asks for batches
        return self.trainer

    @property
    def _device(self) -> torch.device:
        return self._run.strategy.root_device

    def _make(self, epoch: int) -> tuple[Rows, torch.Generator]:
        """Rows of an epoch, and the generator of their order."""
        generator = seeded_generator(self.seed, 0, epoch)
        return self.rows(epoch, generator), generator

    def _share(self, batches: BatchSampler) -> Iterable[list[int]]:
        """Leave of each batch the part of this process, if several train the model together."""
        rank, size = self._run.global_rank, self._run.world_size
        if size == 1:
            return batches
        # A batch smaller than the number of processes would leave one of them without points.
        return [batch[rank::size] for batch in batches if len(batch) >= size]


class Recorded(pl.LightningModule):
    """What all training loops share: history, best weights by validation, learning rates.

    Args:
        model: What is trained.
        learning_rate: Learning rate of Adam.
        n_epochs: Epochs of the run, for the schedule.
        n_constant_epochs: Epochs before the cosine decay to a hundredth begins.
        n_warmup_epochs: Epochs of linear warm-up.
        seed: Seed of every random draw.

    Attributes:
        patience: Epochs without a better validation loss that end the run; None: none do.
    """

    model: Any  # a module; what else it must be, each training says

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
        self.model, self.learning_rate, self.seed = model, learning_rate, seed
        self.n_epochs, self.n_constant_epochs = n_epochs, n_constant_epochs
        self.n_warmup_epochs = n_warmup_epochs
        self.patience: int | None = None
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Any] = {"value": math.inf, "epoch": -1, "weights": None}
        self.listeners: list[Callable[[Recorded], None]] = []
        self.seconds_before = 0.0  # of the training, in processes that ended early
        self._started = time.monotonic()
        self._sums: dict[str, Tensor] = {}

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Adam, warmed up, constant, then decayed along a cosine."""
        optimizer = torch.optim.Adam(self.parameter_groups(), lr=self.learning_rate)

        def factor(epoch: int) -> float:
            warm = min(1.0, (epoch + 1) / (self.n_warmup_epochs + 1))
            tail = max(1, self.n_epochs - self.n_constant_epochs)
            position = min(1.0, max(0, epoch - self.n_constant_epochs) / tail)
            return warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * position)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameters by learning rate."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def on_train_start(self) -> None:
        """Go no further, if a run that ended early is taken up again."""
        self._stop_in_vain()

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
        self._stop_in_vain()
        for listener in self.listeners:
            listener(self)

    def _stop_in_vain(self) -> None:
        """Ask for the end after ``patience`` epochs without a better validation loss."""
        best = self.best["epoch"]
        if self.patience is not None and 0 <= best <= len(self.history) - 1 - self.patience:
            self.trainer.should_stop = True

    @property
    def is_last_epoch(self) -> bool:
        """Whether the current epoch ends the run."""
        return self.current_epoch + 1 == self.n_epochs or self.trainer.should_stop

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
        trainer: Any = self.trainer  # Lightning sets the next without declaring it
        return trainer.datamodule.n_steps

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
        """Add to a FloatingPointError where in the run it happened."""
        try:
            yield
        except FloatingPointError as error:
            where = f"{self.describe_phase()}, step {self.global_step}"
            raise FloatingPointError(f"{error} ({where})") from error

    def _record(self, name: str, value: Tensor, weight: int) -> None:
        total = self._sums.setdefault(name, value.new_zeros(2, dtype=torch.float64))
        total += torch.stack([value.detach().double() * weight, total.new_tensor(weight)])
