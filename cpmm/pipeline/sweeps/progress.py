"""The live table of a sweep: a line for each trial that runs, and what has ended."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from ray import tune

from cpmm.pipeline.progress import duration
from cpmm.pipeline.sweeps.plan import shorten, show
from cpmm.pipeline.sweeps.sweep import Sweep

EVERY = 15.0  # seconds between lines where there is no terminal


class Progress(tune.Callback):
    """Shows a sweep while it runs, of which ``n_done`` trials were recorded before."""

    def __init__(self, sweep: Sweep, n_done: int, unit: str) -> None:
        self.name, self.unit = sweep.name, unit
        self.names = {trial.fingerprint: trial.name for trial in sweep.trials}
        self.n_trials, self.n_done, self.n_failed = sweep.n_trials, n_done, 0
        self.already = n_done
        self.running: dict[str, dict[str, Any]] = {}
        self.best: tuple[float, str] | None = None
        self.started = self.printed = time.monotonic()
        self.live = None

    def __enter__(self) -> Progress:
        """Take over the terminal, if there is one."""
        if sys.stdout.isatty():
            from rich.live import Live

            self.live = Live(get_renderable=self._table, refresh_per_second=2, transient=True)
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Give it back."""
        if self.live:
            self.live.stop()

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Show a trial that starts, or starts again."""
        self.running[trial.trial_id] = {"name": self._name(trial), "since": time.monotonic()}

    def on_trial_result(
        self, iteration: int, trials: list, trial: Any, result: dict, **info: Any
    ) -> None:
        """Show what a trial reports."""
        now = time.monotonic()
        row = self.running.setdefault(trial.trial_id, {"name": self._name(trial), "since": now})
        if "first" not in row and "n_steps" in result:
            row["first"] = (now, result["step"])
        row |= result
        self._line(now)

    def on_trial_recover(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Print that a trial's worker died, and that it goes on elsewhere."""
        self._say(f"{self._name(trial)}: its worker was lost, goes on from its last checkpoint")

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Print how a trial ended."""
        result = trial.last_result or {}
        if "archive_error" not in result:
            self._end(trial, result.get("status", "stopped"), result)

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Print that a trial is given up."""
        self._end(trial, "lost", {"reason": "its worker was lost too often"})

    def _end(self, trial: Any, status: str, result: Mapping[str, Any]) -> None:
        now, name = time.monotonic(), self._name(trial)
        seconds = now - self.running.pop(trial.trial_id, {"since": now})["since"]
        self.n_done += 1
        if status in ("finished", "stopped"):
            value = result.get("validation")
            if status == "finished" and value is not None:
                self.best = min(self.best or (value, name), (value, name), key=lambda best: best[0])
            what = "no density" if value is None else f"validation {value:.4f} {self.unit}"
            what += " (stopped early)" if status == "stopped" else ""
        else:
            self.n_failed += 1
            at = f" at step {result['step']}" if result.get("step") else ""
            what = f"{status}{at}: {result.get('reason', '')}"
        self._say(f"{self.n_done}/{self.n_trials} | {name} | {what} | {seconds:.0f} s")

    def _name(self, trial: Any) -> str:
        fingerprint = trial.config.get("fingerprint")
        if fingerprint in self.names:
            return self.names[fingerprint]
        short = shorten(list(trial.config))
        return " ".join(f"{short[name]}={show(value)}" for name, value in trial.config.items())

    def _say(self, line: str) -> None:
        text = f"sweep {self.name} | {line}"
        if self.live:
            self.live.console.print(text, markup=False, highlight=False)
            return
        with suppress(BrokenPipeError):  # nobody reads it any more: the sweep goes on
            print(text, flush=True)

    def _line(self, now: float) -> None:
        """Print now and then what is running, where there is no terminal."""
        if self.live or now - self.printed < EVERY:
            return
        self.printed = now
        running = "; ".join(
            f"{row['name']}: {row['phase']} step {row['step']}/{row['n_steps']} "
            f"val {row['validation_loss']:.3f} eta {_eta(row, now)}"
            for row in self.running.values()
            if "phase" in row
        )
        self._say(f"{self.n_done}/{self.n_trials} done, eta {self._eta(now)} | {running}")

    def _eta(self, now: float) -> str:
        """Estimate how long the rest of the sweep will take, at the rate so far."""
        share = self.n_done - self.already + sum(map(_share, self.running.values()))
        left = self.n_trials - self.already - share
        return duration((now - self.started) * left / share) if share > 0.2 else "?"

    def _table(self) -> Any:
        from rich.table import Table

        now = time.monotonic()
        best = f", best {self.best[0]:.4f} {self.unit}: {self.best[1]}" if self.best else ""
        failed = f", {self.n_failed} failed" if self.n_failed else ""
        done = f"{self.n_done}/{self.n_trials} done{failed}, eta {self._eta(now)}"
        table = Table(title=f"sweep {self.name}: {done}{best}", title_justify="left")
        for name in ("trial", "space", "step", "train", "validation", "density", "progress", "eta"):
            table.add_column(name, justify="left" if name in ("trial", "space") else "right")
        for row in self.running.values():
            density = row.get("validation", float("inf"))
            table.add_row(
                row["name"], row.get("phase", "starting"),
                f"{row['step']}/{row['n_steps']}" if "n_steps" in row else "",
                _number(row.get("train_loss")), _number(row.get("validation_loss")),
                _number(density), f"{100 * row.get('progress', 0):.0f} %", _eta(row, now),
            )  # fmt: skip
        return table


def _eta(row: Mapping[str, Any], now: float) -> str:
    """Estimate how long the rest of a trial will take, at the rate of its steps so far."""
    if "first" not in row:
        return "?"
    since, before = row["first"]
    done, left = row["step"] - before, max(0, row["n_steps"] - row["step"])
    return duration((now - since) * left / done) if done > 0 else "?"


def _share(row: Mapping[str, Any]) -> float:
    """Share of its steps that a trial has done; epochs differ in their number of steps."""
    if row.get("progress") == 1 or "n_steps" not in row:  # 1: it has ended
        return row.get("progress", 0.0)
    return min(1.0, row["step"] / row["n_steps"])


def _number(value: float | None) -> str:
    return "" if value is None or abs(value) == float("inf") else f"{value:.4f}"
