"""Gradient steps on minibatches, for the estimators: no Lightning, the same loss."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cpmm.training.likelihood import MixtureOptions, mixture_at, mixture_loss
from cpmm.trajectory import pseudotime_grid


@dataclass(frozen=True)
class DescentOptions:
    """How the steps go.

    Attributes:
        n_steps: Steps at most.
        batch_size: Points of a step.
        learning_rate: Of Adam; it is warmed up, and decays along a cosine.
        n_pseudotimes: G.
        initial_rate_factor: The initial states' learning rate in units of the field's.
        n_warmup: Steps of linear warm-up.
        every: Steps between two looks at the validation points.
        patience: Looks without a better validation that end the steps.
        gradient_clip: Largest norm of a gradient.
    """

    n_steps: int
    batch_size: int
    learning_rate: float
    n_pseudotimes: int
    initial_rate_factor: float = 5.0
    n_warmup: int = 100
    every: int = 20
    patience: int = 5
    gradient_clip: float = 1.0


class Descent:
    """Gradient steps of Adam on a mixture, which may go on with other points.

    Args:
        model: Trajectories, or a direct mixture.
        options: How the steps go.
        generator: Source of the minibatches, on the CPU.
    """

    def __init__(
        self, model: nn.Module, options: DescentOptions, generator: torch.Generator
    ) -> None:
        self.model, self.options, self.generator = model, options, generator
        slow = [p for name, p in model.named_parameters() if name != "initial" and p.requires_grad]
        fast = [p for name, p in model.named_parameters() if name == "initial"]
        rate = options.learning_rate
        groups: list[dict[str, Any]] = [{"params": slow, "lr": rate}]
        groups += [{"params": fast, "lr": rate * options.initial_rate_factor}] if fast else []
        self.optimizer = torch.optim.Adam(groups)
        self.rates = [group["lr"] for group in groups]
        self.loss = MixtureOptions(
            noise=0.0,
            learning_rate=rate,
            n_warmup_epochs=0,
            seed=0,
            n_pseudotimes=options.n_pseudotimes,
            nan_is_missing=True,
        )
        self.n_steps = 0

    def step(self, x: Tensor, weight: Tensor, factor: float = 1.0) -> float:
        """Take one step on a minibatch of the points, (N, M), drawn by their weights, (N,).

        Returns:
            The negative log-likelihood of the minibatch before it, nats per dimension.
        """
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor * min(1.0, (self.n_steps + 1) / self.options.n_warmup)
        n = min(len(x), self.options.batch_size)
        index = torch.multinomial(weight, n, replacement=True, generator=self.generator)
        loss, _ = mixture_loss(self.model, x[index.to(x.device)], self.loss, self.generator)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.options.gradient_clip)
        self.optimizer.step()
        self.n_steps += 1
        return float(loss.detach())

    def run(
        self,
        x: Tensor,
        weight: Tensor,
        validation: tuple[Tensor, Tensor] | None,
        n_steps: int,
        listener: Callable[[int, float], None],
    ) -> tuple[list[dict[str, float]], int]:
        """Take steps, and with validation points and their weights end as the best look left it.

        What is no better than the start by two standard errors is taken for chance, and the model
        ends as it began.

        Returns:
            The history, log-densities in nats a point, and the number of steps of the best look.
        """
        options, m = self.options, x.shape[1]
        history, losses = [], []
        for step in range(n_steps + 1):
            if validation is not None and (step % options.every == 0 or step == n_steps):
                log_prob = self.log_prob(validation[0])
                value = float(log_prob @ validation[1] / validation[1].sum())
                train = -m * sum(losses) / len(losses) if losses else math.nan
                history.append({"step": step, "train": train, "validation": value})
                losses = []
                listener(step, value)
                if step == 0:
                    first = best = (value, log_prob, 0, copy.deepcopy(self.model.state_dict()))
                elif value > best[0]:
                    best = (value, log_prob, step, copy.deepcopy(self.model.state_dict()))
                elif step - best[2] >= options.patience * options.every:
                    break
            if step < n_steps:
                factor = 0.01 + 0.495 * (1 + math.cos(math.pi * step / options.n_steps))
                losses.append(self.step(x, weight, factor))
        if validation is None:
            return history, n_steps
        if not _is_gain(best[1] - first[1], validation[1]):
            best = first
        self.model.load_state_dict(best[3])
        return history, best[2]

    @torch.no_grad()
    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of points, (N, M), nats, (N,)."""
        times = pseudotime_grid(self.options.n_pseudotimes, x)
        return mixture_at(self.model, times, self.loss).log_prob(x)


def _is_gain(gain: Tensor, weight: Tensor) -> bool:
    """Whether the weighted mean of differences is two standard errors above zero."""
    share = weight / weight.sum()
    mean = share @ gain
    return bool(mean > 2 * (share.square() @ (gain - mean).square()).sqrt())
