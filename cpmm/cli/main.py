"""Use an extracted mixture: describe it, score points, draw samples, find clusters, plot.

    cpmm info data/digits/mixture
    cpmm score data/digits/mixture points.csv --out scores.csv
    cpmm predict data/digits/mixture points.npy
    cpmm sample data/digits/mixture -n 1000 --seed 1 --out samples.npy
    cpmm plot data/digits/mixture --kind samples --out samples.png
    cpmm export data/digits/mixture --out digits.onnx
    cpmm info dvc+https://host/project.git@v1#data/digits/mixture

`cpmm` and `python -m cpmm` are the same. MIXTURE is a folder, or dvc+REPOSITORY[@REVISION]#PATH.
Points are data as they come, grey levels or real values: the mixture knows its preprocessing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpmm.cli.address import mixture_folder
from cpmm.pipeline.errors import command

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from matplotlib.figure import Figure

    from cpmm.fitted import FittedMixture

BATCH_SIZE = 4096
KINDS = ("means", "samples", "components")


def main() -> None:
    """Run a command."""
    arguments = _parser().parse_args()
    with command("cpmm", getattr(arguments, "out", None), resumes=False):
        try:
            with mixture_folder(arguments.mixture) as folder:
                from cpmm.fitted import FittedMixture

                _check_device(arguments.device)
                arguments.run(FittedMixture.load(folder, arguments.device), arguments)
                sys.stdout.flush()
        except BrokenPipeError:  # of `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def show_info(fitted: FittedMixture, arguments: argparse.Namespace) -> None:
    """Print what a mixture is."""
    from cpmm.card import describe

    values = describe(fitted)
    if arguments.json:
        print(json.dumps(values, indent=1))
        return
    for name, value in values.items():
        print(f"{name:<24} {value}")


def score(fitted: FittedMixture, arguments: argparse.Namespace) -> None:
    """Write the log-density of each point, and its density per dimension."""
    import pandas as pd

    from cpmm.cli.points import write_csv

    _check_out(arguments.out, [".csv"], arguments.points)
    column, sums = fitted.unit.replace(" ", "_"), []

    def tables() -> Iterator[pd.DataFrame]:
        for log_prob in _apply(fitted, arguments, fitted.log_prob):
            density = fitted.density(log_prob)
            sums.append(float(density.sum()))
            yield pd.DataFrame({"log_prob": log_prob.cpu().numpy(), column: density.cpu().numpy()})

    n = write_csv(arguments.out, tables())
    _say(arguments, f"{n} points, mean {sum(sums) / n:.6g} {fitted.unit}")


def predict(fitted: FittedMixture, arguments: argparse.Namespace) -> None:
    """Write the likeliest cluster of each point, and how likely each one is."""
    import pandas as pd

    from cpmm.cli.points import write_csv

    _check_out(arguments.out, [".csv"], arguments.points)

    def tables() -> Iterator[pd.DataFrame]:
        for responsibilities in _apply(fitted, arguments, fitted.cluster_responsibilities):
            share = responsibilities.cpu().numpy()
            table = pd.DataFrame(share, columns=[f"p{c}" for c in range(share.shape[1])])
            table.insert(0, "cluster", share.argmax(1))
            yield table

    n = write_csv(arguments.out, tables())
    _say(arguments, f"{n} points in {fitted.mixture.n_clusters} clusters")


def sample(fitted: FittedMixture, arguments: argparse.Namespace) -> None:
    """Write points drawn from the mixture."""
    import numpy as np
    import pandas as pd

    from cpmm.cli.points import progress_bar, write_csv, write_npy
    from cpmm.seeds import seeded_generator

    n, out = arguments.n, arguments.out
    if n < 1:
        raise ValueError(f"-n is {n}: expected 1 or more")
    _check_out(out, [".csv", ".npy"])
    generator = seeded_generator(arguments.seed, device=arguments.device)

    def drawn() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        with progress_bar("drawing", n) as advance:
            for start in range(0, n, BATCH_SIZE):
                x, cluster = fitted.sample(min(BATCH_SIZE, n - start), generator)
                yield x.cpu().numpy(), cluster.cpu().numpy()
                advance(start + len(x))

    if out is not None and out.suffix == ".npy":
        shape = fitted.image_shape or (fitted.n_features,)
        shape = shape[1:] if fitted.image_shape and shape[0] == 1 else shape
        dtype = np.dtype(np.float64 if fitted.preprocessing.levels is None else np.uint8)
        write_npy(out, (n, *shape), dtype, (x for x, _ in drawn()))
    else:
        names = list(fitted.feature_names)
        write_csv(out, (pd.DataFrame(x, columns=names).assign(cluster=c) for x, c in drawn()))
    _say(arguments, f"{n} points")


def plot(fitted: FittedMixture, arguments: argparse.Namespace) -> None:
    """Draw the means along the trajectories, samples, or the components in the plane."""
    from matplotlib import rc_context

    from cpmm.files import replace_file

    out = arguments.out
    _check_out(out, [".png", ".svg", ".pdf"])
    figure = _figure(fitted, arguments.kind, arguments.seed)
    metadata = {"Date": None} if out.suffix == ".svg" else None
    options: dict[str, Any] = {"format": out.suffix[1:], "metadata": metadata, "dpi": 150}
    with rc_context({"svg.hashsalt": "cpmm"}):
        replace_file(out, lambda temporary: figure.savefig(temporary, **options))
    _say(arguments, arguments.kind)


def export(fitted: FittedMixture, arguments: argparse.Namespace) -> None:
    """Write the mixture for use without torch, as ONNX, or a model card for people, as Markdown."""
    out = arguments.out
    _check_out(out, [".onnx", ".md"])
    if out.suffix == ".md":
        from cpmm.card import model_card
        from cpmm.files import write_text

        write_text(out, model_card(fitted))
        _say(arguments, "model card")
        return
    import torch

    from cpmm.export import OPSET, to_onnx

    dtype = torch.float32 if arguments.float32 else torch.float64
    outputs = to_onnx(fitted, out, dtype, arguments.missing)
    _say(arguments, f"points to {', '.join(outputs)}, opset {OPSET}")


def _figure(fitted: FittedMixture, kind: str, seed: int) -> Figure:
    import torch

    from cpmm import figures
    from cpmm.seeds import seeded_generator

    mixture = fitted.mixture.to("cpu")
    shape, pre = fitted.image_shape, fitted.preprocessing
    z, component = mixture.sample(2000, seeded_generator(seed))

    def shown(points: Any) -> Any:
        return pre.inverse(points).numpy()

    if kind == "means":
        if len(set(mixture.cluster_sizes)) > 1:
            raise ValueError(
                "its idle components were dropped, so the trajectories have no common "
                "pseudotimes: take --kind samples"
            )
        mean = shown(mixture.components.mean).reshape(mixture.n_clusters, -1, fitted.n_features)
        return figures.plot_trajectory_means(mean, shape, data=shown(z))
    if kind == "samples":
        return figures.plot_samples(None, shown(z), None, mixture.cluster[component].numpy(), shape)
    if fitted.n_features != 2:
        raise ValueError(
            f"--kind components needs 2 features, the mixture has {fitted.n_features}: take means "
            "or samples"
        )
    mean = mixture.components.mean
    linear = pre.unwhiten(torch.eye(len(pre.scale)).to(mean)) * mean.new_tensor(pre.scale)
    covariance = linear.mT @ mixture.components.covariance() @ linear
    return figures.plot_components(
        shown(mixture.components.mean), covariance.numpy(), mixture.cluster.numpy(), shown(z)
    )


def _apply(fitted: FittedMixture, arguments: argparse.Namespace, function: Any) -> Iterator[Any]:
    """Yield what ``function`` makes of the points of the input, part by part."""
    import torch

    from cpmm.cli.points import PointReader, progress_bar
    from cpmm.reading.text import TextFormat
    from cpmm.seeds import seeded_generator

    form = TextFormat(arguments.delimiter, arguments.decimal, arguments.encoding, arguments.header)
    reader = PointReader(arguments.points, fitted, arguments.batch_size, form, arguments.axes)
    generator = seeded_generator(arguments.seed, device=arguments.device)
    n = 0
    with progress_bar(arguments.points.name, reader.total) as advance:
        for rows, done in reader:
            try:
                result = function(torch.from_numpy(rows), generator)
            except ValueError as error:
                raise ValueError(f"{arguments.points}, after row {n}: {error}") from error
            yield result
            n += len(rows)
            advance(done)


def _check_device(name: str) -> None:
    import torch

    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(
            f"--device is {name!r}: expected cpu, cuda, or one of several such as cuda:1"
        )
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used here: {reason}") from error


def _check_out(out: Path | None, endings: Sequence[str], points: Path | None = None) -> None:
    """Refuse a file that cannot be written, or whose place is that of the input."""
    if out is None:
        return
    if out.suffix not in endings:
        raise ValueError(f"--out {out} must end in {' or '.join(endings)}")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out {out}: there is no folder {out.parent}: make it first")
    if points is not None and out.exists() and points.exists() and out.samefile(points):
        raise ValueError(
            f"--out {out} is the input itself, and would take its place: name another file"
        )


def _say(arguments: argparse.Namespace, text: str) -> None:
    target = "" if arguments.out is None else f" -> {arguments.out}"
    print(f"{arguments.name}: {text}{target}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cpmm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"cpmm {metadata.version('cpmm')}")
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")

    def add(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=run.__doc__)
        added.set_defaults(run=run)
        added.add_argument("mixture", metavar="MIXTURE", help="folder, or dvc+REPO[@REV]#PATH")
        added.add_argument("--device", default="cpu", help="cpu or cuda; default cpu")
        return added

    info = add("info", show_info, "what it is")
    info.add_argument("--json", action="store_true", help="as JSON")
    for name, run, text in (
        ("score", score, "log-density of points, for example to find outliers"),
        ("predict", predict, "cluster of each point"),
    ):
        added = add(name, run, text)
        added.add_argument("points", type=Path, help="a table such as a .csv file, or a .npy file")
        added.add_argument("--out", type=Path, help="a .csv file; standard output if not given")
        added.add_argument("--seed", type=_seed, default=0, help="of the dequantization; default 0")
        said = f"rows at a time; default {BATCH_SIZE}"
        added.add_argument("--batch-size", type=_positive, default=BATCH_SIZE, help=said)
        said = "between the fields of a table, \\t for a tab; found out if not given"
        added.add_argument("--delimiter", type=_character, help=said)
        said = "before decimals in a table; found out if not given"
        added.add_argument("--decimal", choices=(".", ","), help=said)
        said = "of a table, such as latin-1; UTF-8 and UTF-16 are found out"
        added.add_argument("--encoding", help=said)
        said = "whether a table's first line is names, data (none) or neither (skip)"
        added.add_argument("--header", choices=("names", "none", "skip"), help=said)
        said = "order of the axes of images in a .npy file, such as NHWC; default that of `sample`"
        added.add_argument("--axes", help=said)
    draw = add("sample", sample, "draw points")
    draw.add_argument("-n", type=int, default=100, help="how many; default 100")
    draw.add_argument("--seed", type=_seed, default=0, help="default 0")
    said = "a .csv or .npy file, images N x C x H x W; standard output if not given"
    draw.add_argument("--out", type=Path, help=said)
    written = add("export", export, "write it as ONNX, or a model card")
    written.add_argument("--out", type=Path, required=True, help="a .onnx or .md file")
    said = "points and results as float32; default float64"
    written.add_argument("--float32", action="store_true", help=said)
    said = "whether NaN is a missing value; default for tables"
    written.add_argument("--missing", action=argparse.BooleanOptionalAction, help=said)
    picture = add("plot", plot, "draw a figure")
    picture.add_argument("--kind", choices=KINDS, default="means", help="default means")
    picture.add_argument("--seed", type=_seed, default=0, help="of the samples; default 0")
    picture.add_argument("--out", type=Path, required=True, help="a .png, .svg or .pdf file")
    return parser


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(
            f"expected a whole number from 0 to 2^63 - 1, got {text!r}"
        )
    return int(text)


def _character(text: str) -> str:
    text = "\t" if text == "\\t" else text
    if len(text) != 1 and text != "white space":
        said = f"expected one character, such as , or ; or \\t, got {text!r}"
        raise argparse.ArgumentTypeError(said)
    return text


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


if __name__ == "__main__":
    main()
