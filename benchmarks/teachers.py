"""Compare ways to train a preset's teacher: flow matching, maximum likelihood, both in turn.

    python benchmarks/teachers.py digits
    python benchmarks/teachers.py mnist_cpu --trained --out teachers.json teacher.solver.n_steps=10

The data and the options of the teacher are those of a folder that the pipeline has made, which is
only read. A step of likelihood backpropagates through a solve of the ODE (teacher.solver) and
takes tens of times as long as one of flow matching: its epochs are of some training points, drawn
anew for each. The weights are those of the epoch with the best validation loss; the third way
starts Adam and its schedule afresh from those of the first. Test points are scored as by
workflows/evaluate.py. Progress goes to stderr, a table in Markdown to stdout; an arm that diverges
is reported as failed.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from cpmm.pipeline.config import Config, pick
from cpmm.pipeline.config.compose import compose_preset, flatten
from cpmm.pipeline.config.fingerprints import fingerprint_prepared, fingerprint_teacher
from cpmm.pipeline.config.root import ROOT
from cpmm.pipeline.errors import command
from cpmm.pipeline.stage import load_config

if TYPE_CHECKING:
    from cpmm.data import DataSplits
    from cpmm.teacher import Flow
    from cpmm.training.epochs import EpochData

MATCHED = "flow matching"
LIKELIHOOD = "maximum likelihood"
REFINED = "flow matching, then maximum likelihood"

# A teacher, and what training on each objective took: learning rate, epochs, steps, seconds of the
# clock and of all threads (None: not known), and the best validation loss.
Trained = tuple["Flow", list[dict[str, Any]]]


def match_flow(config: Config, data: DataSplits) -> Trained:
    """Train a teacher by flow matching alone, as the stage ``train_teacher`` does."""
    from cpmm.pipeline.models.fit import drawn_rows
    from cpmm.pipeline.models.flows import make_teacher

    options, seed = config["teacher"], config["seed"]
    rows = drawn_rows(data, options["n_draws"], options["batch_size"], seed)
    flow = make_teacher(options, data, seed)
    epochs = options["flow_matching_epochs"], 0
    return flow, [_train(MATCHED, flow, rows, config, epochs, options["learning_rate"])]


def maximize_likelihood(
    config: Config,
    data: DataSplits,
    likelihood: Mapping[str, int],
    learning_rate: float,
    start: Trained | None = None,
) -> Trained:
    """Train a teacher by likelihood, from the weights of ``start`` or from those the seed draws."""
    import torch

    from cpmm.pipeline.models.flows import make_teacher
    from cpmm.training.epochs import EpochData, Rows

    seed, n_points = config["seed"], likelihood["points"]
    validation = data.points("validation")[0][: likelihood["validation_points"]].float()

    def rows(epoch: int, generator: torch.Generator) -> Rows:
        index = torch.randperm(len(data.raw["train"]), generator=generator)[:n_points]
        return Rows(x=data.draw(1, generator, index))

    flow = make_teacher(config["teacher"], data, seed)
    if start is not None:
        flow.load_state_dict(start[0].state_dict())
    epoch_data = EpochData(
        rows, lambda epoch: validation, likelihood["batch_size"], seed, lambda epoch: n_points
    )
    epochs = 0, likelihood["epochs"]
    phase = _train(LIKELIHOOD, flow, epoch_data, config, epochs, learning_rate)
    return flow, [*(start[1] if start else ()), phase]


def _train(
    objective: str,
    flow: Flow,
    rows: EpochData,
    config: Config,
    epochs: tuple[int, int],
    learning_rate: float,
) -> dict[str, Any]:
    """Train ``flow`` in place, by flow matching and by likelihood for so many epochs."""
    from cpmm.pipeline.models.fit import fit
    from cpmm.training.teacher import TeacherTraining

    options = config["teacher"]
    module = TeacherTraining(
        flow,
        *epochs,
        **pick(options, "kinetic_weight", "jacobian_weight", "n_warmup_epochs"),
        learning_rate=learning_rate,
        seed=config["seed"],
    )
    started, cpu_started = time.monotonic(), time.process_time()
    with TemporaryDirectory() as scratch:
        fit(objective, module, rows, config["trainer"], Path(scratch), options["gradient_clip"])
    flow.cpu()
    return {
        "objective": objective,
        "learning_rate": learning_rate,
        "epochs": module.n_epochs,
        "steps": module.history[-1]["step"],
        "seconds": time.monotonic() - started,
        "cpu_seconds": time.process_time() - cpu_started,
        "best": module.best_summary(),
    }


def read_trained(folder: Path, made: Config, config: Config, data: DataSplits) -> Trained:
    """Read the teacher that the pipeline has trained as ``made`` says; its time is not recorded."""
    import pandas as pd

    from cpmm.artifact import load_header, verify_files
    from cpmm.pipeline.artifacts.store import load_model
    from cpmm.pipeline.models.flows import make_teacher

    fingerprint, options = fingerprint_teacher(made), made["teacher"]
    if fingerprint is None or options["likelihood_epochs"]:
        raise ValueError(
            f"{folder} has no teacher trained by flow matching alone: leave out --trained"
        )
    if config["teacher"]["field"] != options["field"]:
        raise ValueError(
            f"teacher.field is not that of {folder}: leave out --trained, or the override"
        )
    flow = make_teacher(config["teacher"], data, config["seed"])
    load_model(folder / "teacher", "teacher", flow, fingerprint)
    header = load_header(folder / "teacher", "teacher", fingerprint)
    verify_files(folder / "teacher", header, {"history.csv"})
    history = pd.read_csv(folder / "teacher" / "history.csv")
    phase = {
        "objective": MATCHED, "learning_rate": options["learning_rate"], "epochs": len(history),
        "steps": int(history["step"].iloc[-1]), "seconds": None, "cpu_seconds": None,
        "best": header["best"],
    }  # fmt: skip
    return flow, [phase]


def score(flow: Flow, config: Config, data: DataSplits) -> dict[str, Any]:
    """Density of the first test points by a solve at the stated tolerance, as in evaluate."""
    import torch

    from cpmm.odes import Solver
    from cpmm.pipeline.models.flows import flow_log_prob
    from cpmm.pipeline.scores.scorer import Scorer
    from cpmm.seeds import seeded_generator

    options, calls = config["evaluation"], []
    scorer = Scorer(data, "test", options["teacher_points"])
    flow.solver = Solver(**options["teacher_solver"])
    with torch.no_grad():
        log_prob = flow_log_prob(
            flow, scorer.z, seeded_generator(config["seed"], 31), options["batch_size"],
            "teachers", "points of test", alive=lambda: calls.append(1),
        )  # fmt: skip
    density = scorer.density(log_prob)
    if not math.isfinite(density["density"]):
        raise FloatingPointError("the density of the test points is not finite")
    n_batches = math.ceil(len(log_prob) / options["batch_size"])
    return {**density, "n_points": len(log_prob), "calls_per_batch": len(calls) / n_batches}


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and score the three teachers; return the settings and the results by arm."""
    folder = arguments.data or ROOT / "data" / arguments.preset
    made, config = _configure(folder, arguments)

    import torch

    from cpmm.pipeline.artifacts.files import write_json
    from cpmm.pipeline.artifacts.store import load_prepared

    torch.set_num_threads(config["trainer"]["threads"] or torch.get_num_threads())
    data = load_prepared(folder / "prepared", fingerprint_prepared(config))
    rate = config["teacher"]["learning_rate"]
    refine_rate = 0.1 * rate if arguments.refine_rate is None else arguments.refine_rate
    likelihood = {
        "epochs": arguments.likelihood_epochs,
        "points": min(arguments.likelihood_points, len(data.raw["train"])),
        "batch_size": arguments.likelihood_batch,
        "validation_points": min(arguments.validation_points, len(data.raw["validation"])),
    }
    trained: dict[str, Trained] = {}

    def refined() -> Trained:
        if MATCHED not in trained:
            raise FloatingPointError("there is no flow-matched teacher to start from")
        return maximize_likelihood(config, data, likelihood, refine_rate, trained[MATCHED])

    arms = {
        MATCHED: lambda: (
            read_trained(folder, made, config, data)
            if arguments.trained
            else match_flow(config, data)
        ),
        LIKELIHOOD: lambda: maximize_likelihood(config, data, likelihood, rate),
        REFINED: refined,
    }
    record = _describe(arguments, config, data) | {
        "likelihood": likelihood | {"learning_rate": rate, "refine_rate": refine_rate},
        "n_parameters": None,
        "arms": {},
    }
    for name, train in arms.items():
        print(f"teachers | {name}", flush=True)
        try:
            flow, phases = trained[name] = train()
            record["n_parameters"] = sum(p.numel() for p in flow.parameters())
            scores = score(flow, config, data)
            record["arms"][name] = {"status": "finished", **scores, "phases": phases}
        except FloatingPointError as error:
            record["arms"][name] = {"status": "failed", "reason": str(error)}
            print(f"teachers | {name} failed: {error}", flush=True)
        if arguments.out:
            write_json(arguments.out, record)
    return record


def _describe(arguments: argparse.Namespace, config: Config, data: DataSplits) -> dict[str, Any]:
    """What all arms have in common."""
    import torch

    exact = data.n_features <= config["teacher"]["exact_trace_up_to"]
    return {
        **pick(vars(arguments), "preset", "overrides", "trained"),
        "prepared": fingerprint_prepared(config),
        "seed": config["seed"],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "unit": data.preprocessing.density_unit[0],
        "trace": "exact" if exact else "Hutchinson, fixed seed",
        "scoring_solver": config["evaluation"]["teacher_solver"],
        "scoring_batch_size": config["evaluation"]["batch_size"],
        "teacher": config["teacher"],
    }


def _configure(folder: Path, arguments: argparse.Namespace) -> tuple[Config, Config]:
    """Configuration that the folder was made with, and that of the comparison."""
    made = load_config(folder / "config.yaml")
    if made.get("name") != arguments.preset:
        raise ValueError(f"{folder} is of preset {made.get('name')!r}, not {arguments.preset!r}")
    base = flatten(pick(made, "seed", "data", "teacher"))
    told = {
        "teacher.flow_matching_epochs": arguments.flow_matching_epochs,
        "evaluation.teacher_points": arguments.points,
    }
    chosen = [f"{option}={value}" for option, value in told.items() if value is not None]
    return made, compose_preset(arguments.preset, [*base, *arguments.overrides, *chosen])


def tabulate(record: Mapping[str, Any]) -> str:
    """Write the results as Markdown: the settings, a table, and why an arm failed."""
    arms, solver, likelihood = record["arms"], record["scoring_solver"], record["likelihood"]
    training = record["teacher"]["solver"]
    points = {arm["n_points"] for arm in arms.values() if "n_points" in arm}
    lines = [
        f"{record['preset']}, seed {record['seed']}, {record['threads']} threads, "
        f"torch {record['torch']}. Density of the first {' or '.join(map(str, points)) or '-'} "
        f"test points: {solver['method']}, tolerances {solver['rtol']:g}/{solver['atol']:g}, "
        f"trace {record['trace']}. Likelihood: {likelihood['epochs']} epochs of "
        f"{likelihood['points']} points, batch {likelihood['batch_size']}, "
        f"{training['method']} with {training['n_steps']} steps, learning rate "
        f"{likelihood['learning_rate']:g}, after flow matching {likelihood['refine_rate']:g}.",
        "",
        f"| training | {record['unit']} | seconds | CPU seconds | steps | calls of the field a "
        "batch |",
        "|---|---|---|---|---|---|",
    ]
    for name, arm in arms.items():
        if arm["status"] == "failed":
            lines.append(f"| {name} | failed | - | - | - | - |")
            continue
        took = [
            " + ".join("?" if p[key] is None else f"{round(p[key], 1)}" for p in arm["phases"])
            for key in ("seconds", "cpu_seconds", "steps")
        ]
        density = f"{arm['density']:.4f} ± {arm['density_standard_error']:.4f}"
        row = (name, density, *took, f"{arm['calls_per_batch']:.0f}")
        lines.append(f"| {' | '.join(row)} |")
    for name, arm in arms.items():
        if arm["status"] == "failed":
            lines += ["", f"{name} failed: {arm['reason']}"]
    return "\n".join(lines)


def _whole(least: int) -> Any:
    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"expected {least} or more, got {text}")
        return value

    return number


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("preset", help="a file of conf/preset/, without .yaml")
    add("overrides", nargs="*", help="in Hydra's syntax, such as teacher.solver.n_steps=10")
    add("--data", type=Path, metavar="FOLDER", help="data/<preset> by default")
    add("--trained", action="store_true", help="take that folder's flow-matched teacher")
    add("--flow-matching-epochs", type=_whole(1), metavar="N", help="the folder's by default")
    add("--likelihood-epochs", type=_whole(1), default=10, metavar="N", help="10 by default")
    add(
        "--likelihood-points", type=_whole(1), default=1024, metavar="N",
        help="training points of an epoch of likelihood, at most; 1024 by default",
    )  # fmt: skip
    add("--likelihood-batch", type=_whole(1), default=128, metavar="N", help="128 by default")
    add(
        "--validation-points", type=_whole(1), default=512, metavar="N",
        help="validation points that choose likelihood's epoch, at most; 512 by default",
    )  # fmt: skip
    add(
        "--refine-rate", type=float, metavar="RATE",
        help="learning rate of likelihood after flow matching; a tenth of teacher.learning_rate "
        "by default",
    )  # fmt: skip
    add(
        "--points", type=_whole(2), metavar="N",
        help="first so many test points that are scored; evaluation.teacher_points by default",
    )  # fmt: skip
    add("--out", type=Path, metavar="FILE.json", help="where to write the settings and the results")
    arguments = parser.parse_intermixed_args()
    if arguments.trained and arguments.flow_matching_epochs:
        parser.error("--trained takes a teacher as it is: leave out --flow-matching-epochs")
    if arguments.refine_rate is not None and not 0 < arguments.refine_rate < math.inf:
        parser.error(f"--refine-rate is {arguments.refine_rate}: expected a number above 0")
    with command("teachers", arguments.out, resumes=False), redirect_stdout(sys.stderr):
        record = compare(arguments)
    print(tabulate(record))
    if arguments.out:
        print(f"teachers: {len(record['arms'])} arms -> {arguments.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
