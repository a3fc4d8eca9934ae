"""Run a training loop: Lightning's trainer, one progress line, a checkpoint, resumption."""

from __future__ import annotations

import logging
import pickle
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint

from cpmm.data import DataSplits
from cpmm.pipeline.artifacts.files import is_checkpoint
from cpmm.pipeline.artifacts.store import save_model
from cpmm.pipeline.config import pick
from cpmm.pipeline.models.runtime import compute_device
from cpmm.pipeline.progress import ProgressLine
from cpmm.training.epochs import EpochData, Recorded, Rows

PRECISIONS = ("32-true", "tf32", "bf16-mixed", "64-true")
# Of Lightning's trainer, for every run.
OPTIONS = {
    "use_distributed_sampler": False,  # EpochData leaves each process its part
    "check_val_every_n_epoch": 1,
    "reload_dataloaders_every_n_epochs": 1,
    "num_sanity_val_steps": 0,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class TrainingProgress(Callback):
    """Feeds the progress line of a training: after each epoch, and within those that take long."""

    def __init__(self, name: str, unit: str = "nats/dim") -> None:
        self.line = ProgressLine(name)
        self.unit = unit
        self.first_step = 0
        self.epoch_started = self.line.started
        self.phase = ""  # of the epoch that the latest losses are of
        self.within = False  # whether a step of the current epoch was told

    def on_train_start(self, trainer: pl.Trainer, module: Recorded) -> None:
        """Start the clock."""
        self.line = ProgressLine(self.line.name)
        self.first_step = module.global_step
        if module.global_step:
            epoch = f"{module.current_epoch}/{module.n_epochs}"
            self.line.show(f"resuming after epoch {epoch}, step {module.global_step}", last=True)

    def on_train_epoch_start(self, trainer: pl.Trainer, module: Recorded) -> None:
        """Note the time: steps are told of epochs that take longer than the time between lines."""
        self.epoch_started = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Recorded, *_: object) -> None:
        """Tell the step within an epoch that takes long."""
        if self.line.is_due(self.epoch_started):
            self._show(module)
            self.within = True

    def __call__(self, module: Recorded) -> None:
        """Tell of the epoch that has just ended."""
        last = module.is_last_epoch
        self.phase = module.describe_phase()
        if last or self.within or self.line.is_due():
            self.within = False
            self._show(module, last)

    def _show(self, module: Recorded, last: bool = False) -> None:
        phase = module.describe_phase()
        row = module.history[-1] if module.history else {}
        # Losses of another space, or of another objective, do not compare: say what they are of.
        of = "" if phase == self.phase else f" in {self.phase or 'the epoch before'}"
        names = {"train": "train", "validation": "val"}
        losses = [f"{short} {row[name]:.4f}" for name, short in names.items() if name in row]
        parts = [f"step {module.global_step}/{module.n_steps}", phase]
        if losses:
            parts.append(f"{' '.join(losses)} {self.unit}{of}")
        done, n = module.global_step - self.first_step, module.n_steps - self.first_step
        self.line.show(*parts, *self.line.pace(done, n), last=last)


def fit(
    name: str,
    module: Recorded,
    data: EpochData,
    config: dict[str, Any],
    scratch: Path,
    gradient_clip: float,
    unit: str = "nats/dim",
    listeners: Sequence[Callable[[Recorded], None]] = (),
    quiet: bool = False,
    ddp: Mapping[str, Any] | None = None,
) -> None:
    """Train ``module``, from its last checkpoint in ``scratch`` if there is one.

    Args:
        name: Of the stage, for the progress line.
        module: What to train; holds its best weights afterwards.
        data: Rows of each epoch.
        config: The section ``trainer``.
        scratch: Where the checkpoint lies.
        gradient_clip: Largest norm of a gradient.
        unit: Unit of the losses, for the progress line.
        listeners: Called with the module after each epoch.
        quiet: Print no progress line.
        ddp: Options of Lightning's trainer for several processes that train one model.

    Raises:
        FloatingPointError: If the run diverges.
        ValueError: If an option is unknown.
    """
    progress = [] if quiet else [TrainingProgress(name, unit)]
    module.listeners = [*progress, *listeners]
    checkpoint = scratch / "last.ckpt"
    options = {"max_epochs": module.n_epochs, "gradient_clip_val": gradient_clip}
    options |= _machine_options(config) | (ddp or {})
    # What Lightning says of hardware, of its other products and of its own use of torch.
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        for category in (UserWarning, FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category, module="pytorch_lightning")
        keep = ModelCheckpoint(
            scratch, checkpoint.stem, every_n_epochs=config["checkpoint_every_n_epochs"],
            enable_version_counter=False, save_on_train_epoch_end=True,
        )  # fmt: skip
        trainer = pl.Trainer(**options, **OPTIONS, callbacks=[*progress, keep])
        resume = str(checkpoint) if _is_usable(checkpoint, name) else None
        try:
            trainer.fit(module, data, ckpt_path=resume, weights_only=True)
        except SystemExit as error:
            if isinstance(error.__context__, KeyboardInterrupt):  # Lightning makes an exit of it
                raise KeyboardInterrupt from None
            raise
    module.restore_best()


def save_trained(folder: Path, kind: str, module: Recorded, fingerprint: str) -> None:
    """Write what a training has come to: the weights of its best epoch, and its history."""
    folder.mkdir(exist_ok=True)
    pd.DataFrame(module.history).to_csv(folder / "history.csv", index=False)
    header = {"fingerprint": fingerprint, "best": module.best_summary()}
    save_model(folder, kind, module.model, header)


def _machine_options(config: Mapping[str, Any]) -> dict[str, Any]:
    precision = config["precision"]
    if precision not in PRECISIONS:
        raise ValueError(
            f"trainer.precision is {precision!r}: choose one of {', '.join(PRECISIONS)}"
        )
    device = compute_device(config)
    return {
        "precision": "32-true" if precision == "tf32" else precision,
        "accelerator": "cuda" if config["accelerator"] == "gpu" else device,
        **pick(config, "devices", "deterministic"),
    }


def _is_usable(checkpoint: Path, name: str) -> bool:
    """Whether a run can go on from a checkpoint; says why not, if there is one."""
    if not checkpoint.exists():
        return False
    try:
        if not is_checkpoint(checkpoint):
            raise ValueError("its bytes are not those that were written")
        torch.load(checkpoint, map_location="cpu", weights_only=True)
    except (ValueError, RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        print(f"{name} | {checkpoint} is no checkpoint ({reason}): starting afresh", flush=True)
        return False
    return True


def drawn_rows(data: DataSplits, n_draws: int, batch_size: int, seed: int) -> EpochData:
    """Augmented, freshly dequantized training points for each epoch, without a curriculum."""
    validation = data.points("validation")[0].float()
    return EpochData(
        lambda epoch, generator: Rows(x=data.draw(n_draws, generator)),
        lambda epoch: validation,
        batch_size,
        seed,
        lambda epoch: n_draws * len(data.raw["train"]),
    )
