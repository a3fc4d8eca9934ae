from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from cpmm.spaces import Curriculum
from cpmm.training.epochs import Rows
from cpmm.training.likelihood import path_cost, posterior_disagreement
from cpmm.training.mixture import MixtureTraining
from cpmm.trajectory import draw_pseudotimes, pseudotime_grid
from tests.oracles import dense_observed_log_prob, torch_mixture
from tests.training.runs import (
    CURRICULUM,
    Break,
    M,
    broken_at,
    equal,
    fit,
    make_trajectories,
    mixture_training,
    random_points,
    true_loss,
    validation_rows,
    weights,
)

# Lightning's advice about workers does not fit rows held in memory.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning")


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


def test_training_on_points_with_gaps_reaches_the_likelihood_of_the_truth():
    def rows(epoch: int, generator: torch.Generator) -> Rows:
        x = random_points(generator)
        return Rows(x=x.masked_fill(torch.rand(x.shape, generator=generator) < 0.3, torch.nan))

    def holed(epoch: int) -> Tensor:
        x = validation_rows(epoch)
        x[::2, 0] = torch.nan
        return x

    module = mixture_training(
        make_trajectories(n_clusters=1),
        curriculum=Curriculum(0, 1, 40),
        learning_rate=0.05,
        noise=0.01,
        nan_is_missing=True,
    )
    fit(module, rows, holed)
    with torch.no_grad():
        fa = module.model.mixture(pseudotime_grid(4)).components
    whole = validation_rows(0)
    assert -float(torch_mixture(fa).log_prob(whole).mean()) / M < true_loss(whole) + 0.1
    best = dense_observed_log_prob(holed(0), fa.to(torch.float64)) + fa.log_weight.double().numpy()
    last = -np.logaddexp.reduce(best, 1).mean() / M
    assert module.history[-1]["validation"] == pytest.approx(last, rel=1e-4)


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


@pytest.mark.parametrize(
    ("epoch", "where"), [(0, r"space 1/2, step 0"), (1, r"space 2/2, step 4"), (3, "fine-tuning")]
)
def test_a_loss_that_is_not_finite_says_where(epoch, where):
    with pytest.raises(FloatingPointError, match=f"16 of 16 log-densities are not finite.*{where}"):
        fit(mixture_training(), broken_at(epoch))


@pytest.mark.parametrize("method", ["midpoint", "dopri5"])
def test_weights_that_are_not_finite_say_where(method):
    module = mixture_training(make_trajectories(method=method))
    with pytest.raises(FloatingPointError, match=r"space 2/2, step 4"):
        fit(module, callbacks=(Break(1),))
