from __future__ import annotations

import numpy as np
import pytest
import torch

from cpmm.fields import MLPField
from cpmm.odes import Solver
from cpmm.teacher import Flow
from tests.training.runs import (
    Break,
    M,
    broken_at,
    fit,
    teacher_training,
    true_loss,
    validation_rows,
)

# Lightning's advice about workers does not fit rows held in memory.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning")


@pytest.mark.parametrize("epoch", [1, 3])
def test_a_teachers_loss_that_is_not_finite_says_where(epoch):
    # Flow matching, then a likelihood, of rows that are not finite.
    with pytest.raises(FloatingPointError, match=rf"epoch {epoch + 1}/4, step {4 * epoch}"):
        fit(teacher_training(), broken_at(epoch))


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
