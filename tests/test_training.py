from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import get_type_hints

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn

import cpmm.pipeline.models.fit
from cpmm.fields import MLPField
from cpmm.odes import Solver
from cpmm.seeds import seeded_generator
from cpmm.spaces import Curriculum
from cpmm.teacher import Flow
from cpmm.training import (
    EpochData,
    MixtureTraining,
    Recorded,
    Rows,
    TeacherTraining,
    path_cost,
    posterior_disagreement,
)
from cpmm.trajectory import StateLayout, Trajectories, draw_pseudotimes, pseudotime_grid
from tests.oracles import torch_mixture

# Lightning's advice about workers does not fit rows held in memory.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning")

M = 2
CURRICULUM = Curriculum(n_spaces=2, epochs_per_space=1, fine_tune_epochs=3)


def make_trajectories(seed: int = 0, n_clusters: int = 2, **options) -> Trajectories:
    torch.manual_seed(seed)
    layout = StateLayout(M, 1, 1.0)
    return Trajectories(
        layout,
        MLPField(layout.size, 8, 1),
        torch.randn(n_clusters, layout.size),
        Solver(n_steps=4, **options),
    )


def mixture_training(model: nn.Module | None = None, **changes) -> MixtureTraining:
    options = {
        "curriculum": CURRICULUM,
        "pseudo_label_spaces": 0,
        "pseudo_label_weight": 0.0,
        "n_pseudotimes": 3,
        "pseudotimes": "uniform",
        "n_extracted": 4,
        "noise": 0.01,
        "entropy_weight": 0.0,
        "path_weight": 0.0,
        "consistency_weight": 0.0,
        "temperature": 1.0,
        "learning_rate": 0.01,
        "initial_rate_factor": 2.0,
        "n_warmup_epochs": 1,
        "seed": 0,
    }
    return MixtureTraining(model or make_trajectories(), **(options | changes))


def teacher_training(flow: Flow | None = None, **changes) -> TeacherTraining:
    torch.manual_seed(0)
    options = {
        "flow_matching_epochs": 2,
        "likelihood_epochs": 2,
        "kinetic_weight": 0.1,
        "jacobian_weight": 0.1,
        "learning_rate": 0.01,
        "n_warmup_epochs": 1,
        "seed": 0,
    }
    flow = flow or Flow(MLPField(M, 8, 1), Solver("rk4", n_steps=4), "hutchinson")
    return TeacherTraining(flow, **(options | changes))


def random_points(generator: torch.Generator) -> Tensor:
    return torch.randn(50, M, generator=generator) * torch.tensor([1.0, 0.3])


def random_rows(epoch: int, generator: torch.Generator) -> Rows:
    return Rows(x=random_points(generator))


def validation_rows(epoch: int) -> Tensor:
    return random_points(torch.Generator().manual_seed(99))


def true_loss(x: Tensor) -> float:
    """Nats per dimension of the rows above under the density that they come from."""
    truth = torch.distributions.Normal(torch.zeros(M), torch.tensor([1.0, 0.3]))
    return -float(truth.log_prob(x).mean())


def fit(
    module: Recorded,
    rows: Callable = random_rows,
    validation: Callable = validation_rows,
    resume: Path | None = None,
    callbacks: tuple[Callback, ...] = (),
    seed: int = 0,
) -> Recorded:
    trainer = pl.Trainer(
        max_epochs=module.n_epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        num_sanity_val_steps=0,
        reload_dataloaders_every_n_epochs=1,
        callbacks=list(callbacks),
    )
    data = EpochData(rows, validation, batch_size=16, seed=seed, n_rows=lambda epoch: 50)
    trainer.fit(module, data, ckpt_path=resume and str(resume), weights_only=True)
    return module


def weights(module: Recorded) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.model.state_dict().items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(value, second[name]) for name, value in first.items())


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
            f"trial | step 4/4 | fine-tuning | train {row['train']:.4f} val {row['validation']:.4f} bits"
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


def test_history_holds_the_losses_in_nats_per_dimension():
    # Without noise, draws and progress every batch is scored by the same mixture.
    module = mixture_training(learning_rate=0.0, noise=0.0, pseudotimes="grid", n_extracted=3)
    rows = {epoch: validation_rows(epoch) * (epoch + 1) for epoch in range(CURRICULUM.n_epochs)}
    fit(module, lambda epoch, _: Rows(x=rows[epoch]), lambda epoch: rows[epoch][:7])
    with torch.no_grad():
        mixture = torch_mixture(module.model.mixture(pseudotime_grid(3)).components)
    for row in module.history:
        epoch = row["epoch"]
        assert row["step"] == 4 * (epoch + 1)
        assert row["space"] == [0, 1, 2, 2, 2][epoch]
        expected = -mixture.log_prob(rows[epoch]) / M
        assert row["train"] == pytest.approx(float(expected.mean()), rel=1e-5)
        assert row["validation"] == pytest.approx(float(expected[:7].mean()), rel=1e-5)


def test_the_best_weights_are_those_of_an_input_space_epoch():
    kept = {}

    class Keep(Callback):
        def on_train_epoch_end(self, trainer, module) -> None:
            kept[module.current_epoch] = weights(module)

    # The guided epochs score better than any other, the last one worse.
    scale = [0.01, 0.01, 3.0, 2.0, 9.0]
    module = fit(
        mixture_training(),
        lambda epoch, generator: Rows(x=scale[epoch] * random_points(generator)),
        lambda epoch: scale[epoch] * validation_rows(epoch),
        callbacks=(Keep(),),
    )
    by_epoch = {row["epoch"]: row["validation"] for row in module.history}
    best = min((2, 3, 4), key=by_epoch.get)
    assert min(by_epoch, key=by_epoch.get) in {0, 1}
    assert best != 4
    assert module.best_summary() == {"validation": by_epoch[best], "epoch": best}
    assert not equal(weights(module), kept[best])
    module.restore_best()
    assert equal(weights(module), kept[best])


def test_without_fine_tuning_the_last_weights_stay():
    module = fit(mixture_training(curriculum=Curriculum(3, 1, 0)))
    last = weights(module)
    module.restore_best()
    assert equal(weights(module), last)
    assert module.best["epoch"] == -1


def test_training_reaches_the_likelihood_of_the_truth():
    module = mixture_training(
        make_trajectories(n_clusters=1),
        curriculum=Curriculum(0, 1, 40),
        learning_rate=0.05,
    )
    fit(module)
    assert module.best["value"] == pytest.approx(true_loss(validation_rows(0)), abs=0.1)


def mean_responsibilities(module: MixtureTraining, x: Tensor) -> np.ndarray:
    with torch.no_grad():
        fa = module.model.mixture(pseudotime_grid(3)).components
    joint = fa.log_weight + torch_mixture(fa).component_distribution.log_prob(x[:, None])
    return joint.softmax(1).reshape(len(x), -1, 3).sum(2).mean(0).numpy()


@pytest.mark.parametrize("entropy_weight", [0.0, 0.7])
@pytest.mark.parametrize("path_weight", [0.0, 0.3])
def test_the_loss_is_likelihood_entropy_and_path(entropy_weight, path_weight):
    losses = []

    class See(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_index) -> None:
            losses.append((outputs["loss"].item(), batch["x"]))

    module = mixture_training(
        learning_rate=0.0,
        noise=0.0,
        pseudotimes="grid",
        entropy_weight=entropy_weight,
        path_weight=path_weight,
    )
    fit(module, callbacks=(See(),))
    with torch.no_grad():
        fa = module.model.mixture(pseudotime_grid(3)).components
    path = np.mean([((m[1:] - m[:-1]) ** 2).sum() * 2 / M for m in fa.mean.reshape(2, 3, M)])
    for loss, x in losses:
        share = mean_responsibilities(module, x)
        expected = -float(torch_mixture(fa).log_prob(x).mean()) / M
        expected += entropy_weight * (share * np.log(share)).sum() + path_weight * path
        assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("later", [0.0, 0.7])
def test_while_told_the_loss_is_the_likelihood_of_points_and_groups(later):
    losses = []

    class See(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_index) -> None:
            losses.append((module.current_epoch, outputs["loss"].item(), batch))

    def rows(epoch: int, generator: torch.Generator) -> Rows:
        x = random_points(generator)
        group = (x[:, 0] > 0).long()
        return Rows(x=x, group=group) if epoch < module.pseudo_label_epochs or later else Rows(x=x)

    module = mixture_training(
        curriculum=Curriculum(3, 2, 1),
        pseudo_label_spaces=2,
        pseudo_label_weight=later,
        temperature=1.5,
        learning_rate=0.0,
        noise=0.0,
        pseudotimes="grid",
    )
    fit(module, rows, callbacks=(See(),))
    assert module.pseudo_label_epochs == 4
    with torch.no_grad():
        fa = module.model.mixture(pseudotime_grid(3)).components
    for epoch, loss, batch in losses:
        x = batch["x"]
        joint = fa.log_weight + torch_mixture(fa).component_distribution.log_prob(x[:, None])
        joint = joint.reshape(len(x), 2, 3).logsumexp(2)
        assert batch.keys() == ({"x", "group"} if epoch < 4 or later else {"x"})
        log_prob, cross_entropy = joint.logsumexp(1), torch.zeros(())
        if epoch < 4:
            assert torch.equal(batch["group"], (x[:, 0] > 0).long())  # rows stay together
            log_prob = joint[torch.arange(len(x)), batch["group"]]
        elif later:
            posterior = (joint / 1.5).softmax(1)
            cross_entropy = -posterior[torch.arange(len(x)), batch["group"]].log().mean()
        expected = -float(log_prob.mean()) / M + later * float(cross_entropy)
        assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.4])
def test_points_and_their_views_are_drawn_to_one_posterior(weight):
    losses = []

    class See(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_index) -> None:
            losses.append((outputs["loss"].item(), batch))

    def rows(epoch: int, generator: torch.Generator) -> Rows:
        x = random_points(generator)
        return Rows(x=x, view=x + 1)

    module = mixture_training(
        learning_rate=0.0, noise=0.0, pseudotimes="grid", consistency_weight=weight, temperature=2.5
    )
    fit(module, rows, callbacks=(See(),))
    with torch.no_grad():
        fa = module.model.mixture(pseudotime_grid(3)).components
    for loss, batch in losses:
        assert torch.equal(batch["view"], batch["x"] + 1)
        posteriors = []
        for points in (batch["x"], batch["view"]):
            joint = fa.log_weight + torch_mixture(fa).component_distribution.log_prob(
                points[:, None]
            )
            density = joint.exp().reshape(len(points), 2, 3).sum(2).double().numpy() ** (1 / 2.5)
            posteriors.append(density / density.sum(1, keepdims=True))
        p, q = posteriors
        divergence = ((p * np.log(p / q)).sum(1) + (q * np.log(q / p)).sum(1)).mean() / 2
        expected = -float(torch_mixture(fa).log_prob(batch["x"]).mean()) / M + weight * divergence
        assert loss == pytest.approx(expected, rel=1e-4)
    assert all(row["disagreement"] > 0 for row in module.history)


def test_equal_posteriors_do_not_disagree_however_far_their_densities_are(generator):
    own = 300 * torch.randn(20, 4, generator=generator, dtype=torch.float64)
    assert float(posterior_disagreement(own, own - 1000, 30.0)) == pytest.approx(0, abs=1e-12)
    own = own.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda seen: posterior_disagreement(own, seen, 30.0),
        (own.detach().flip(0).requires_grad_(),),
    )


@pytest.mark.parametrize(("pseudo_label_spaces", "epochs"), [(0, 0), (1, 2), (3, 6), (9, 6)])
def test_no_more_spaces_are_told_than_there_are(pseudo_label_spaces, epochs):
    module = mixture_training(
        curriculum=Curriculum(3, 2, 1), pseudo_label_spaces=pseudo_label_spaces
    )
    assert module.pseudo_label_epochs == epochs


def test_entropy_regularization_raises_the_entropy_of_the_clusters():
    def rows(epoch: int, generator: torch.Generator) -> Rows:  # nine in ten on one side
        side = torch.where(torch.rand(50, 1, generator=generator) < 0.9, -3.0, 3.0)
        return Rows(x=side + 0.3 * torch.randn(50, M, generator=generator))

    entropy = []
    x = torch.cat([rows(0, torch.Generator().manual_seed(s)).tensors["x"] for s in range(4)])
    for weight in (0.0, 5.0):
        module = mixture_training(
            curriculum=Curriculum(0, 1, 15), learning_rate=0.03, entropy_weight=weight
        )
        share = mean_responsibilities(fit(module, rows), x)
        entropy.append(-(share * np.log(share)).sum())
    assert entropy[1] > entropy[0] + 0.1
    assert entropy[1] <= math.log(2) + 1e-6


def test_path_cost_is_that_of_a_straight_line():
    model = make_trajectories()
    mean = torch.linspace(0, 1, 5)[:, None] * torch.tensor([3.0, 4.0])
    fa = model.mixture(pseudotime_grid(5)).components
    still = torch.zeros(5, M)
    mixture = model.mixture(pseudotime_grid(5))
    object.__setattr__(mixture.components, "mean", torch.cat([mean, still]))
    assert fa.n_components == 10
    # ||(3, 4)||^2 / M for one trajectory of two.
    assert path_cost(mixture).item() == pytest.approx(25 / M / 2)


def test_path_cost_does_not_depend_on_where_a_straight_line_is_looked_at(generator):
    model = make_trajectories()
    times = draw_pseudotimes("uniform", 40, generator)
    mixture = model.mixture(times)
    mean = torch.cat([times[:, None] * torch.tensor([3.0, 4.0]), torch.zeros(40, M)])
    object.__setattr__(mixture.components, "mean", mean)
    length = (times[-1] - times[0]).item()
    assert path_cost(mixture, times).item() == pytest.approx(length * 25 / M / 2, rel=1e-4)
    grid = pseudotime_grid(9)
    mixture = model.mixture(grid)
    assert path_cost(mixture, grid).item() == pytest.approx(path_cost(mixture).item())


def test_path_regularization_shortens_the_trajectories():
    costs = []
    for weight in (0.0, 10.0):
        module = mixture_training(curriculum=Curriculum(0, 1, 10), path_weight=weight)
        fit(module)
        costs.append(path_cost(module.model.mixture(pseudotime_grid(9))).item())
    assert costs[1] < costs[0] / 2


@pytest.mark.parametrize("epoch", [1, 3])
def test_a_teachers_loss_that_is_not_finite_says_where(epoch):
    # Flow matching, then a likelihood, of rows that are not finite.
    with pytest.raises(FloatingPointError, match=rf"epoch {epoch + 1}/4, step {4 * epoch}"):
        fit(teacher_training(), broken_at(epoch))


def broken_at(epoch: int) -> Callable:
    def rows(now: int, generator: torch.Generator) -> Rows:
        x = random_points(generator)
        if now == epoch:
            x[:] = float("nan")
        return Rows(x=x)

    return rows


@pytest.mark.parametrize(
    ("epoch", "where"), [(0, r"space 1/2, step 0"), (1, r"space 2/2, step 4"), (3, "fine-tuning")]
)
def test_a_loss_that_is_not_finite_says_where(epoch, where):
    with pytest.raises(FloatingPointError, match=f"16 of 16 log-densities are not finite.*{where}"):
        fit(mixture_training(), broken_at(epoch))


class Break(Callback):
    """Sets a weight to NaN before an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: pl.Trainer, module: Recorded) -> None:
        if module.current_epoch == self.epoch:
            with torch.no_grad():
                next(module.model.parameters()).fill_(float("nan"))


@pytest.mark.parametrize("method", ["midpoint", "dopri5"])
def test_weights_that_are_not_finite_say_where(method):
    module = mixture_training(make_trajectories(method=method))
    with pytest.raises(FloatingPointError, match=r"space 2/2, step 4"):
        fit(module, callbacks=(Break(1),))


class BreakValidation(Break):
    """Sets a weight to NaN before the validation of an epoch."""

    on_validation_epoch_start = Break.on_train_epoch_start
    on_train_epoch_start = Callback.on_train_epoch_start


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


@pytest.mark.parametrize("epoch", [1, 3])
@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_a_diverged_teacher_says_where(epoch, method):
    flow = Flow(MLPField(M, 8, 1), Solver(method, n_steps=4))
    with pytest.raises(FloatingPointError, match=rf"epoch {epoch + 1}/4, step {4 * epoch}"):
        fit(teacher_training(flow), callbacks=(Break(epoch),))


def test_the_teacher_changes_its_objective_and_keeps_the_best_of_the_last():
    module = fit(teacher_training(flow_matching_epochs=2, likelihood_epochs=3))
    assert [row["objective"] for row in module.history] == [0, 0, 1, 1, 1]
    likelihood = {row["epoch"]: row["validation"] for row in module.history[2:]}
    assert module.best["epoch"] == min(likelihood, key=likelihood.get)
    module = fit(teacher_training(flow_matching_epochs=3, likelihood_epochs=0))
    losses = [row["validation"] for row in module.history]
    assert module.best_summary() == {"validation": min(losses), "epoch": int(np.argmin(losses))}


@pytest.mark.parametrize("objective", ["flow_matching", "likelihood"])
def test_a_teacher_learns_a_gaussian(objective):
    epochs = {"flow_matching": (60, 0), "likelihood": (0, 10)}[objective]
    torch.manual_seed(0)
    flow = Flow(MLPField(M, 16, 1), Solver("rk4", n_steps=4))
    module = teacher_training(
        flow,
        flow_matching_epochs=epochs[0],
        likelihood_epochs=epochs[1],
        kinetic_weight=0.0,
        jacobian_weight=0.0,
        learning_rate=0.05,
    )
    fit(module)
    x = validation_rows(0)
    with torch.no_grad():
        got = -float(module.model.log_prob(x, torch.Generator()).mean()) / M
    assert got == pytest.approx(true_loss(x), abs=0.1)


def test_validations_of_a_teacher_have_the_same_draws():
    module = fit(teacher_training(learning_rate=0.0))
    losses = [row["validation"] for row in module.history]
    assert losses[0] == losses[1]
    assert losses[2] == losses[3]


def test_a_teacher_without_epochs_raises():
    with pytest.raises(ValueError, match="at least one epoch"):
        teacher_training(flow_matching_epochs=0, likelihood_epochs=0)
