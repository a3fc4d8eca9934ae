from __future__ import annotations

import math
import signal
import threading
from types import SimpleNamespace
from typing import get_type_hints

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from torch import Tensor

import cpmm.pipeline.models.fit
from cpmm.seeds import seeded_generator
from cpmm.spaces import Curriculum
from cpmm.training.epochs import EpochData, Recorded, Rows
from tests.training.runs import (
    CURRICULUM,
    BreakValidation,
    M,
    equal,
    fit,
    mixture_training,
    random_rows,
    teacher_training,
    validation_rows,
    weights,
)

# Lightning's advice about workers does not fit rows held in memory.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning")


@pytest.mark.parametrize("make", [mixture_training, teacher_training])
def test_same_seed_gives_the_same_weights(make):
    first, second = fit(make()), fit(make())
    assert equal(weights(first), weights(second))
    assert first.history == second.history
    assert not equal(weights(first), weights(fit(make(seed=1))))
    assert not equal(weights(first), weights(fit(make(), seed=1)))


@pytest.mark.parametrize("make", [mixture_training, teacher_training])
def test_resumed_equals_uninterrupted(make, tmp_path):
    every = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    whole = fit(make(), callbacks=(every,))
    checkpoints = sorted(tmp_path.iterdir())
    assert len(checkpoints) == whole.n_epochs
    for path in checkpoints[:-1]:
        resumed = make()
        with torch.no_grad():  # everything comes from the checkpoint
            for parameter in resumed.model.parameters():
                parameter.zero_()
        fit(resumed, resume=path)
        assert resumed.history == whole.history
        assert equal(weights(resumed), weights(whole))
        assert resumed.best_summary() == whole.best_summary()
        assert equal(resumed.best["weights"], whole.best["weights"])


def test_a_run_in_vain_ends_and_resumed_it_stays_ended(tmp_path):
    def stuck():  # no step changes anything
        return mixture_training(curriculum=Curriculum(2, 2, 8), learning_rate=0.0, patience=3)

    every = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    told: list[bool] = []
    module = stuck()
    module.listeners = [lambda module: told.append(module.is_last_epoch)]
    fit(module, callbacks=(every,))
    assert module.best["epoch"] == 4  # after those of the spaces, which do not count
    assert len(module.history) == 8
    assert told == [False] * 7 + [True]
    for path in sorted(tmp_path.iterdir()):
        resumed = fit(stuck(), resume=path)
        assert resumed.history == module.history
        assert resumed.best_summary() == module.best_summary()


class LearningRates(Callback):
    def __init__(self) -> None:
        self.rates: list[list[float]] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])


def test_the_learning_rate_warms_up_stays_and_decays():
    record = LearningRates()
    module = mixture_training(curriculum=Curriculum(2, 2, 4), n_warmup_epochs=2)
    fit(module, callbacks=(record,))
    # A third, two thirds and whole; from the first epoch of fine-tuning along a cosine to 1 %.
    cosine = [0.01 + 0.99 * math.cos(math.pi * i / 8) ** 2 for i in range(4)]
    factors = np.array([1 / 3, 2 / 3, 1, 1, *cosine])
    np.testing.assert_allclose(record.rates, np.outer(factors, [0.01, 0.02]))


def test_each_epoch_sees_each_row_once_in_an_order_of_its_own():
    calls, seen = [], []

    def rows(epoch: int, generator: torch.Generator) -> Rows:
        calls.append(epoch)
        return Rows(x=torch.stack([torch.arange(50.0), torch.full((50,), float(epoch))], 1))

    class See(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_index) -> None:
            seen.append(batch["x"])

    fit(mixture_training(noise=0.0), rows, callbacks=(See(),))
    n = CURRICULUM.n_epochs
    assert calls == list(range(n))
    assert [len(batch) for batch in seen] == [16, 16, 16, 2] * n
    orders = []
    for epoch in range(n):
        batch = torch.cat(seen[4 * epoch : 4 * epoch + 4])
        assert batch[:, 1].unique().tolist() == [epoch]
        assert batch[:, 0].sort().values.tolist() == list(range(50))
        orders.append(tuple(batch[:, 0].tolist()))
    assert len(set(orders)) == n


def data_of_rank(rank: int, size: int, epoch: int = 0, n_rows: int = 50) -> EpochData:
    """Rows as one of several processes sees them."""

    def rows(epoch: int, generator: torch.Generator) -> Rows:
        return Rows(x=torch.randn(n_rows, M, generator=generator), index=torch.arange(n_rows))

    data = EpochData(
        rows,
        lambda epoch: torch.arange(90.0)[:, None],
        batch_size=16,
        seed=3,
        n_rows=lambda epoch: n_rows,
    )
    data.trainer = SimpleNamespace(
        current_epoch=epoch,
        max_epochs=4,
        global_rank=rank,
        world_size=size,
        strategy=strategy_on("cpu"),
    )
    return data


def strategy_on(device: str) -> SimpleNamespace:
    return SimpleNamespace(root_device=torch.device(device))


@pytest.mark.parametrize("epoch", [0, 4])
def test_a_process_alone_takes_every_batch_whole(epoch):
    generator = seeded_generator(3, 0, epoch)
    x = torch.randn(50, M, generator=generator)
    order = torch.randperm(50, generator=generator)
    data = data_of_rank(0, 1, epoch)
    for batch, part in zip(data.train_dataloader(), order.split(16), strict=True):
        assert torch.equal(batch["index"], part)
        assert torch.equal(batch["x"], x[part])
    got = [batch["x"].flatten() for batch in data.val_dataloader()]
    assert [len(batch) for batch in got] == [64, 26]
    assert torch.equal(torch.cat(got), torch.arange(90.0))


@pytest.mark.parametrize("size", [2, 3])
def test_processes_share_each_batch_without_overlap(size):
    alone = data_of_rank(0, 1)
    ranks = [data_of_rank(rank, size) for rank in range(size)]
    for loader in ("train_dataloader", "val_dataloader"):
        name = "index" if loader == "train_dataloader" else "x"
        whole = [batch[name] for batch in getattr(alone, loader)()]
        whole = [batch for batch in whole if len(batch) >= size]  # 50 rows end in a batch of two
        parts = [[batch[name] for batch in getattr(data, loader)()] for data in ranks]
        assert [len(part) for part in parts] == [len(whole)] * size  # or some would wait for ever
        for batch, *shares in zip(whole, *parts, strict=True):
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
            together = torch.cat(shares).flatten()
            assert torch.equal(together.sort().values, batch.flatten().sort().values)


def test_a_loader_has_as_many_batches_as_it_says():
    for rank, size in ((0, 1), (0, 2), (2, 3)):
        data = data_of_rank(rank, size)
        loader = data.train_dataloader()
        assert 4 * len(loader) == 4 * len(list(loader)) == data.n_steps  # of four epochs


@pytest.mark.parametrize("device", ["cpu", "meta"])  # the second stands for a GPU
def test_the_next_epoch_is_made_while_a_gpu_computes(device):
    data, made = data_of_rank(0, 1), []
    make_rows = data.rows

    def rows(epoch: int, generator: torch.Generator) -> Rows:
        made.append((epoch, threading.current_thread() is threading.main_thread()))
        return make_rows(epoch, generator)

    data.rows = rows
    data.trainer.strategy = strategy_on(device)
    for epoch in (1, 2, 3):  # of four, the run goes on after the first
        data.trainer.current_epoch = epoch
        loader, alone = data.train_dataloader(), data_of_rank(0, 1, epoch).train_dataloader()
        data._thread.submit(int).result()  # what was begun before is done
        last = min(3, epoch + 1) if device == "meta" else epoch
        assert [of for of, _ in made] == list(range(1, last + 1))
        assert list(loader.sampler) == list(alone.sampler)
        assert {batch["x"].device.type for batch in loader} == {device}
        assert {batch["x"].device.type for batch in data.val_dataloader()} == {device}
    in_main = [True, False, False] if device == "meta" else [True] * 3
    assert [is_main for _, is_main in made] == in_main


def test_rows_that_cannot_be_made_ahead_are_an_error_of_their_own_epoch():
    data = data_of_rank(0, 1)
    make_rows = data.rows

    def rows(epoch: int, generator: torch.Generator) -> Rows:
        if epoch == 1:
            assert threading.current_thread() is not threading.main_thread()
            raise OSError("the store has gone")
        return make_rows(epoch, generator)

    data.rows = rows
    data.trainer.strategy = strategy_on("meta")
    assert len(data.train_dataloader()) == 4
    data.trainer.current_epoch = 1
    with pytest.raises(OSError, match="the store has gone"):
        data.train_dataloader()


@pytest.mark.parametrize("make", [mixture_training, teacher_training])
def test_processes_draw_noise_of_their_own(make):
    def draws(rank: int, epoch: int) -> Tensor:
        module = make(seed=5)
        module._trainer = SimpleNamespace(current_epoch=epoch, global_rank=rank, world_size=3)
        module.on_train_epoch_start()
        return torch.rand(4, generator=module._generator)

    drawn = {(rank, epoch): draws(rank, epoch) for rank in range(3) for epoch in range(2)}
    assert len({tuple(values.tolist()) for values in drawn.values()}) == 6
    for epoch in range(2):  # a process alone, and the first of several
        expected = torch.rand(4, generator=seeded_generator(5, 1, epoch))
        assert torch.equal(drawn[0, epoch], expected)


def test_annotations_are_of_things_that_exist():
    for function in (EpochData._share, Recorded.on_train_epoch_end, EpochData.val_dataloader):
        get_type_hints(function)


@pytest.mark.parametrize("make", [mixture_training, teacher_training])
def test_listeners_hear_each_epoch_once_with_its_history(make):
    module, heard = make(), []

    def listen(to: Recorded) -> None:
        assert to is module
        heard.append((to.current_epoch, [dict(row) for row in to.history], to.best["value"]))

    module.listeners = [listen, listen]
    fit(module)
    assert [epoch for epoch, _, _ in heard] == [e for e in range(module.n_epochs) for _ in "ab"]
    for epoch, history, best in heard:
        assert history == module.history[: epoch + 1]
        assert {"train", "validation", "epoch", "step"} <= history[-1].keys()
        candidates = [row["validation"] for row in history if row["epoch"] >= 2]
        assert best == min(candidates, default=math.inf)


def test_listeners_of_a_resumed_run_hear_the_rest(tmp_path):
    every = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    fit(mixture_training(), callbacks=(every,))
    module, heard = mixture_training(), []
    module.listeners = [lambda m: heard.append((m.current_epoch, len(m.history)))]
    fit(module, resume=tmp_path / "epoch=2.ckpt")
    assert heard == [(3, 4), (4, 5)]


OPTIONS = {
    "accelerator": "cpu", "devices": 1, "precision": "32-true", "deterministic": True,
    "checkpoint_every_n_epochs": 1,
}  # fmt: skip


@pytest.mark.parametrize("quiet", [False, True])
def test_a_run_of_one_epoch_prints_its_only_line(quiet, tmp_path, capsys):
    module = mixture_training(curriculum=Curriculum(0, 1, 1))
    heard = []
    data = EpochData(random_rows, validation_rows, batch_size=16, seed=0, n_rows=lambda epoch: 50)
    cpmm.pipeline.models.fit.fit(
        "trial", module, data, OPTIONS, tmp_path, 1.0, "bits", [heard.append], quiet=quiet
    )
    lines = capsys.readouterr().out.splitlines()
    assert heard == [module]
    assert (tmp_path / "last.ckpt").is_file()
    if quiet:
        assert lines == []
    else:
        row = module.history[0]
        (line,) = lines
        assert line.startswith(
            f"trial | step 4/4 | fine-tuning | train {row['train']:.4f} val "
            f"{row['validation']:.4f} bits"
        )
        assert line.endswith("| eta 0.0m")


def test_an_interruption_stays_one(tmp_path):
    def interrupt(module):
        raise KeyboardInterrupt

    data = EpochData(random_rows, validation_rows, batch_size=16, seed=0, n_rows=lambda epoch: 50)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt):
            cpmm.pipeline.models.fit.fit(
                "trial", mixture_training(), data, OPTIONS, tmp_path, 1.0, listeners=[interrupt]
            )
    finally:
        signal.signal(signal.SIGINT, handler)


def test_validation_scores_the_rows_of_its_epoch_in_order():
    seen = []

    class See(Callback):
        def on_validation_batch_start(
            self, trainer, module, batch, batch_index, dataloader_idx=0
        ) -> None:
            seen.append(batch["x"])

    def validation(epoch: int) -> Tensor:
        return torch.stack([torch.arange(70.0), torch.full((70,), float(epoch))], 1)

    fit(mixture_training(), validation=validation, callbacks=(See(),))
    got = torch.cat(seen)
    assert torch.equal(got, torch.cat([validation(e) for e in range(CURRICULUM.n_epochs)]))


@pytest.mark.parametrize(
    ("make", "where"), [(mixture_training, "space 2/2, step 8"), (teacher_training, "epoch 4/4")]
)
def test_validation_says_where_too(make, where):
    epoch = 1 if make is mixture_training else 3
    with pytest.raises(FloatingPointError, match=where):
        fit(make(), callbacks=(BreakValidation(epoch),))


@pytest.mark.parametrize(
    ("make", "epoch", "where"),
    [
        (mixture_training, 1, "space 2/2, step 8"), (mixture_training, 3, "fine-tuning, step 16"),
        (teacher_training, 0, "epoch 1/4, step 4"), (teacher_training, 1, "epoch 2/4, step 8"),
    ],
)  # fmt: skip
def test_a_validation_loss_that_is_nan_says_where(make, epoch, where):
    def validation(now: int) -> Tensor:
        return validation_rows(now) * (float("nan") if now == epoch else 1.0)

    module, heard = make(), []
    module.listeners = [lambda m: heard.append(m.current_epoch)]
    with pytest.raises(FloatingPointError, match=rf"NaN: lower the learning rate .*\({where}\)"):
        fit(module, validation=validation)
    assert heard == list(range(epoch))
