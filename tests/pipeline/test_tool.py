"""The command line on mixtures: every command, good and bad input, addresses of DVC repositories."""

import gc
import io
import json
import subprocess
import sys
import tempfile

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, TINY
from matplotlib.figure import Figure
from PIL import Image

from cpmm import figures
from cpmm.cli import main as tool
from cpmm.cli.address import mixture_folder, split_address
from cpmm.factor_analyzers import FactorAnalyzers
from cpmm.fitted import FittedMixture
from cpmm.mixture import Mixture
from cpmm.pipeline.artifacts.store import load_prepared
from cpmm.pipeline.config.compose import compose_preset
from cpmm.pipeline.errors import EXTRAS
from cpmm.pipeline.scores import drawing
from cpmm.preprocessing import Preprocessing
from cpmm.seeds import seeded_generator
from workflows import build_spaces, extract_mixture, prepare_data, train_cpmm, train_teacher

STAGES = (prepare_data, train_teacher, build_spaces, train_cpmm, extract_mixture)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Mixtures of digits and of rings, to be read only."""
    folder = tmp_path_factory.mktemp("made")
    for preset, overrides in (("digits", []), ("rings", ["data.options.n=2200"])):
        config = compose_preset(preset, [*TINY, *overrides])
        for stage in STAGES:
            stage.main(folder / preset, config)
    return folder


@pytest.fixture
def cpmm(monkeypatch, capsys):
    """Run a command in this process; return its exit status and what it printed."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["cpmm", *map(str, arguments)])
        capsys.readouterr()
        try:
            tool.main()
            status = 0
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


def test_info_is_that_of_the_header(made, cpmm):
    status, printed, _ = cpmm("info", made / "digits" / "mixture", "--json")
    assert status == 0
    values = json.loads(printed)
    header = json.loads((made / "digits" / "mixture" / "mixture.json").read_text())
    assert values["components"] == 30
    assert values["fingerprint"] == header["fingerprint"]
    assert "17 grey levels" in values["data"]
    status, printed, _ = cpmm("info", made / "rings" / "mixture" / "mixture.safetensors")
    assert "nats per dimension" in printed


@pytest.mark.parametrize("ending", ["csv", "npy"])
@pytest.mark.parametrize("preset", ["digits", "rings"])
def test_scores_are_those_of_the_library_whatever_the_file(preset, ending, made, cpmm, tmp_path):
    fitted = FittedMixture.load(made / preset / "mixture")
    raw = load_prepared(made / preset / "prepared").raw["test"]
    path, out = tmp_path / f"points.{ending}", tmp_path / "scores.csv"
    if ending == "csv":  # in another order, beside a column of something else
        table = pd.DataFrame(raw.numpy(), columns=list(fitted.feature_names))
        table = table[table.columns[::-1]].assign(note="a, b")
        table.to_csv(path, index=False)
    else:
        shape = (-1, *fitted.image_shape[1:]) if fitted.image_shape else raw.shape
        np.save(path, raw.numpy().reshape(shape))
    status, printed, said = cpmm(
        "score", made / preset / "mixture", path, "--out", out, "--seed", 7, "--batch-size", 33
    )
    assert (status, printed) == (0, ""), said
    expected = fitted.log_prob(raw, seeded_generator(7))
    got = pd.read_csv(out)
    assert got.columns.tolist() == ["log_prob", fitted.unit.replace(" ", "_")]
    np.testing.assert_allclose(got["log_prob"], expected, rtol=1e-12)
    np.testing.assert_allclose(got.iloc[:, 1], fitted.density(expected), rtol=1e-12)
    assert f"{len(raw)} points, mean {got.iloc[:, 1].mean():.6g}" in said


def test_the_mean_score_of_the_test_split_is_the_reported_density(made, cpmm, tmp_path):
    from cpmm.pipeline.scores.scorer import Scorer

    data = load_prepared(made / "rings" / "prepared")
    np.save(tmp_path / "test.npy", data.raw["test"].numpy())
    _, printed, _ = cpmm("score", made / "rings" / "mixture", tmp_path / "test.npy")
    mixture = FittedMixture.load(made / "rings" / "mixture").mixture
    score = Scorer(data, "test")
    reported = score.density(mixture.log_prob(score.z))["density"]
    assert pd.read_csv(io.StringIO(printed)).iloc[:, 1].mean() == pytest.approx(reported, rel=1e-12)


def test_clusters_are_the_likeliest(made, cpmm, tmp_path):
    fitted = FittedMixture.load(made / "rings" / "mixture")
    raw = load_prepared(made / "rings" / "prepared").raw["test"]
    np.save(tmp_path / "points.npy", raw.numpy())
    status, printed, _ = cpmm("predict", made / "rings" / "mixture", tmp_path / "points.npy")
    table = pd.read_csv(io.StringIO(printed))
    assert status == 0
    z, _ = fitted.transform(raw, torch.Generator())
    np.testing.assert_array_equal(table["cluster"], fitted.mixture.predict(z))
    np.testing.assert_allclose(table[["p0", "p1"]].sum(axis=1), 1)


@pytest.mark.parametrize("preset", ["digits", "rings"])
def test_samples_can_be_scored_and_depend_on_the_seed_alone(preset, made, cpmm, tmp_path):
    tables = {}
    for name, seed in (("a.csv", 1), ("b.csv", 1), ("c.csv", 2), ("a.npy", 1)):
        status, _, said = cpmm(
            "sample",
            made / preset / "mixture",
            "-n",
            5000,
            "--seed",
            seed,
            "--out",
            tmp_path / name,
        )
        assert status == 0, said
        tables[name] = (tmp_path / name).read_bytes()
    assert tables["a.csv"] == tables["b.csv"] != tables["c.csv"]
    table, array = pd.read_csv(tmp_path / "a.csv"), np.load(tmp_path / "a.npy")
    np.testing.assert_allclose(table.drop(columns="cluster"), array.reshape(5000, -1), rtol=1e-12)
    for name in ("a.csv", "a.npy"):
        status, _, said = cpmm("score", made / preset / "mixture", tmp_path / name)
        assert (status, "5000 points" in said) == (0, True)
    assert not list(tmp_path.glob("*.partial"))


def test_ellipses_of_whitened_data_are_those_of_the_data(tmp_path, monkeypatch, cpmm):
    generator = seeded_generator(0)
    mixing = torch.tensor([[3.0, 0.0], [2.8, 0.7]], dtype=torch.float64)
    raw = torch.randn(4000, 2, generator=generator, dtype=torch.float64) @ mixing.mT + 5
    preprocessing = Preprocessing.fit(raw, None, None, "whitened", generator)
    one = FactorAnalyzers(
        torch.zeros(1), torch.zeros(1, 2), torch.zeros(1, 2, 1), torch.zeros(1, 2)
    )  # a standard normal behind the whitening is the Gaussian of the data
    header = {
        "preprocessing": preprocessing.to_dict(), "image_shape": None, "feature_names": ["a", "b"]
    }  # fmt: skip
    Mixture(one, (1,)).save(tmp_path / "mixture", header, preprocessing.tensors)
    drawn = {}

    def draw(mean, covariance, *rest, **options):
        drawn["covariance"] = covariance
        return Figure()

    monkeypatch.setattr(figures, "plot_components", draw)
    status, _, said = cpmm(
        "plot", tmp_path / "mixture", "--kind", "components", "--out", tmp_path / "a.png"
    )
    assert status == 0, said
    np.testing.assert_allclose(drawn["covariance"][0], np.cov(raw.T.numpy()), rtol=1e-5)


@pytest.mark.parametrize(
    ("preset", "kind", "ending"),
    [("digits", "means", "png"), ("digits", "samples", "svg"), ("rings", "means", "svg"),
     ("rings", "samples", "png"), ("rings", "components", "png")],
)  # fmt: skip
def test_plots_are_drawn(preset, kind, ending, made, cpmm, tmp_path):
    out = tmp_path / f"figure.{ending}"
    status, _, said = cpmm("plot", made / preset / "mixture", "--kind", kind, "--out", out)
    assert status == 0, said
    if ending == "png":
        assert np.asarray(Image.open(out).convert("L")).std() > 5
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", "x0\n1\n", "lacks 1 of the mixture's 2 features: x1"),
        ("p.csv", "x0,x1\n", "no rows"),
        ("p.csv", "", "header"),
        ("p.csv", "x0,x1\n1,2\n1,a\n", "column 'x1' of {path} must hold finite numbers: got 'a' in row 2"),
        ("p.csv", "x0,x1\n1,2\n1,\n", "got a gap in row 2"),
        ("p.csv", "x0,x1\n1,inf\n", "got inf in row 1"),
        ("p.csv", "x0,x1\n1,2\n1,2,3\n", "as many fields in every row as in its header"),
        ("p.csv", b"x0,x1\n1,\xff\xfe\n", "UTF-8"),
        ("p.npy", b"\x93NUMPY", "not a whole .npy file"),
        ("p.npy", np.zeros((3, 5)), "must be (N, 2), as the mixture: got float64 of shape (3, 5)"),
        ("p.npy", np.zeros((0, 2)), "no rows"),
        ("p.npy", np.array([[1.0, np.nan]]), "'x1' of {path} must be finite, and at most 1e+30 in size: got nan in row 1"),
        ("p.npy", np.array([[{}, 1]], object), "{path} of shape (1, 2) holds Python objects"),
        ("p.npy", np.zeros(3, "U4"), "{path} of shape (3,) holds text"),
        ("p.npy", b"PAR1", "not a whole .npy file, but a Parquet file"),
        ("p.txt", "1 2", "add a header, or call the columns x0 to x1; set --header none"),
        ("p.mat", b"MATLAB 5.0 MAT-file", "p.mat is a MATLAB file: np.save("),
        ("p.csv", None, "there is no file"),
    ],
)  # fmt: skip
def test_bad_points_are_named_and_leave_no_file(name, content, message, made, cpmm, tmp_path):
    path, out = tmp_path / name, tmp_path / "out.csv"
    if isinstance(content, np.ndarray):
        np.save(path, content)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.write_text(content)
    status, _, said = cpmm("score", made / "rings" / "mixture", path, "--out", out)
    assert status == 1
    assert said.startswith("cpmm: error: ")
    assert said.count("\n") == 1
    assert message.format(path=path) in said
    assert not out.exists()


@pytest.fixture(scope="module")
def colour(tmp_path_factory):
    """A mixture of images of 3 x 4 x 4, and some images of five grey levels, (N, C, H, W)."""
    raw = torch.from_numpy(np.random.default_rng(0).integers(0, 5, (50, 48), np.uint8))
    preprocessing = Preprocessing.fit(raw, 256, 1e-6, "shared", seeded_generator(0))
    fa = FactorAnalyzers(
        torch.zeros(2),
        torch.randn(2, 48, generator=seeded_generator(1)),
        torch.zeros(2, 48, 1),
        torch.zeros(2, 48),
    )
    header = {
        "preprocessing": preprocessing.to_dict(), "image_shape": [3, 4, 4],
        "feature_names": [f"pixel_{c}_{h}_{w}" for c, h, w in np.ndindex(3, 4, 4)],
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("colour") / "mixture"
    Mixture(fa, (1, 1)).save(folder, header, preprocessing.tensors)
    return folder, raw.numpy().reshape(50, 3, 4, 4)


@pytest.mark.parametrize("command", ["score", "predict"])
def test_images_of_any_type_and_named_order_have_the_same_scores(command, colour, cpmm, tmp_path):
    mixture, x = colour
    path = tmp_path / "x.npy"
    np.save(path, x)
    words = (command, mixture, path, "--batch-size", "7")
    expected = cpmm(*words)
    assert expected[0] == 0, expected
    for dtype in (">u2", "u4", "u8", "i1", "f2", ">f4", "f8", "g"):
        np.save(path, x.astype(dtype))
        assert cpmm(*words) == expected
    for axes in ("NHWC", "HWCN", "CHWN", "WNCH"):
        np.save(path, x.transpose(["NCHW".index(letter) for letter in axes]))
        assert cpmm(*words, "--axes", axes) == expected
        status, printed, said = cpmm(command, mixture, path)
        assert (status, printed) == (1, ""), axes
        assert f"50 images of 3 channels of 4 x 4 with --axes {axes}" in said or axes == "WNCH"
    np.save(path, x.reshape(50, 48))
    assert cpmm(*words) == expected


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.full((5, 48), 0.5), "got 0.5 in image 1, float64 of 0.5 to 0.5; if 1 is the brightest, save np.round(255 * x)"),
        (np.full((5, 48), 256), "got 256 in image 1"),
        (np.full((5, 48), -1), "got -1 in image 1"),
        (np.full((5, 48), True), "nothing but 0 and 1, bool"),
        (np.full((5, 48), 1.0), "nothing but 0 and 1, float64"),
        (np.full((5, 48), 2j), "complex numbers"),
        (np.full((5, 3, 4, 5), 2), "must be (N, 3, 4, 4) or (N, 48), as the mixture"),
    ],
)  # fmt: skip
def test_images_of_another_scale_are_refused(x, message, colour, cpmm, tmp_path):
    np.save(tmp_path / "x.npy", x)
    status, printed, said = cpmm("score", colour[0], tmp_path / "x.npy")
    assert (status, printed) == (1, "")
    assert message in said
    assert said.count("\n") == 1


def test_colour_samples_are_written_as_they_are_read(colour, cpmm, tmp_path):
    for n in (3, 50):
        assert cpmm("sample", colour[0], "-n", n, "--out", tmp_path / "x.npy")[0] == 0
        assert np.load(tmp_path / "x.npy").shape == (n, 3, 4, 4)
        assert cpmm("score", colour[0], tmp_path / "x.npy", "--axes", "NCHW")[0] == 0
    assert cpmm("score", colour[0], tmp_path / "x.npy")[0] == 0
    assert "images of 3 channels of 4 x 4" in cpmm("info", colour[0])[1]
    for kind in ("means", "samples"):
        out = tmp_path / f"{kind}.png"
        status, _, said = cpmm("plot", colour[0], "--kind", kind, "--out", out)
        assert status == 0, said
        pixels = np.asarray(Image.open(out).convert("RGB")).astype(int)
        assert (np.ptp(pixels, axis=2) > 60).mean() > 0.01  # colours, not grey


def test_colour_images_need_nothing_but_their_path(cpmm, tmp_path):
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (450, 3, 1, 1)) // 2 + random.integers(0, 128, (450, 3, 5, 5))
    np.save(tmp_path / "x.npy", x.astype(">u2"))
    options = [f"data.options.path={tmp_path / 'x.npy'}", "spaces.kind=noise", "cpmm.n_clusters=2"]
    config = compose_preset("npy", [*TINY, *options])
    for stage in STAGES:
        if stage is not train_teacher:
            stage.main(tmp_path / "npy", config)
    mixture = tmp_path / "npy" / "mixture"
    data = load_prepared(tmp_path / "npy" / "prepared")
    assert data.image_shape == (3, 5, 5)
    for figure in drawing._draw_mixture(data, Mixture.load(mixture).to(torch.float64), 0).values():
        figure.savefig(tmp_path / "figure.png")
        pixels = np.asarray(Image.open(tmp_path / "figure.png").convert("RGB")).astype(int)
        assert (np.ptp(pixels, axis=2) > 30).mean() > 0.01
    status, _, said = cpmm("score", mixture, tmp_path / "x.npy")
    assert (status, "450 points" in said) == (0, True), said


@pytest.mark.parametrize("change", ["bytes inserted", "shape negative"])
def test_an_array_whose_header_lies_is_not_scored(change, made, cpmm, tmp_path):
    path = tmp_path / "p.npy"
    np.save(path, np.random.default_rng(0).normal(size=(5, 2)))
    whole = path.read_bytes()
    changed = whole[:140] + bytes(3) + whole[140:]  # every value after it would be another
    path.write_bytes(changed if change == "bytes inserted" else whole.replace(b"(5, 2)", b"(5,-2)"))
    status, printed, said = cpmm("score", made / "rings" / "mixture", path)
    assert (status, printed) == (1, "")
    assert said.startswith(f"cpmm: error: {path} is not a whole .npy file")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "nowhere"], "there is no mixture nowhere"),
        (["info", "dvc+.#"], "no address"),
        (["sample", "{mixture}", "-n", "0"], "-n is 0"),
        (["sample", "{mixture}", "--out", "a.txt"], "--out a.txt must end in .csv or .npy"),
        (["sample", "{mixture}", "--out", "no/a.npy"], "there is no folder no: make it first"),
        (["plot", "{mixture}", "--out", "abc"], "--out abc must end in .png or .svg or .pdf"),
        (["info", "{folder}"], "holds one: give {mixture}"),
        (["info", "{mixture}", "--device", "mps"], "--device is 'mps': expected cpu, cuda"),
        (["info", "{mixture}", "--device", "cuda:77"], "--device cuda:77 cannot be used here"),
        (["plot", "{mixture}", "--kind", "components", "--out", "a.png"], "needs 2 features"),
    ],
)
def test_bad_options_are_named(arguments, message, made, cpmm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {"folder": made / "digits", "mixture": made / "digits" / "mixture"}
    status, _, said = cpmm(*(a.format(**places) for a in arguments))
    assert status == 1
    assert said.startswith("cpmm: error: ")
    assert message.format(**places) in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "{mixture}", "--seed", "-1"], "--seed: expected a whole number from 0"),
        (["score", "{mixture}", "a.csv", "--delimiter", ""], "--delimiter: expected one character"),
        (["score", "{mixture}", "a.csv", "--delimiter", "::"], "--delimiter: expected one character"),
    ],
)  # fmt: skip
def test_values_that_cannot_be_are_refused_with_the_options_name(
    arguments, message, made, cpmm, capsys
):
    mixture = str(made / "digits" / "mixture")
    status, _, said = cpmm(*(a.format(mixture=mixture) for a in arguments))
    assert status == 2
    assert message in said


def test_points_are_not_overwritten_and_tabs_may_be_written_out(made, cpmm, tmp_path):
    mixture, path = made / "rings" / "mixture", tmp_path / "points.csv"
    assert cpmm("sample", mixture, "-n", "5", "--out", path)[0] == 0
    before = path.read_bytes()
    (tmp_path / "same.csv").symlink_to(path)
    for command in ("score", "predict"):
        for out in (path, tmp_path / "same.csv"):
            status, _, said = cpmm(command, mixture, path, "--out", out)
            assert (status, path.read_bytes()) == (1, before)
            assert "is the input itself" in said
    tabbed = tmp_path / "tabs.csv"
    tabbed.write_bytes(before.replace(b",", b"\t"))
    assert (
        cpmm("score", mixture, tabbed, "--delimiter", r"\t")[:2] == cpmm("score", mixture, path)[:2]
    )
    (tmp_path / "empty.csv").write_text("")
    assert (
        "empty.csv is empty: expected a header" in cpmm("score", mixture, tmp_path / "empty.csv")[2]
    )


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("dvc+.#data/digits/mixture", (".", None, "data/digits/mixture")),
        ("dvc+.@v1#a", (".", "v1", "a")),
        ("dvc+/a/b@c#d/", ("/a/b", "c", "d")),
        ("dvc+https://host/p.git@v1.2#a/b", ("https://host/p.git", "v1.2", "a/b")),
        ("dvc+ssh://git@host/p.git#a", ("ssh://git@host/p.git", None, "a")),
        ("dvc+ssh://git@host:22/p.git@main#a", ("ssh://git@host:22/p.git", "main", "a")),
        ("dvc+git@host:team/p.git@v1#a", ("git@host:team/p.git", "v1", "a")),
    ],
)
def test_addresses_are_taken_apart(address, parts):
    assert split_address(address) == parts


def git(folder, *arguments):
    subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
        cwd=folder, check=True, capture_output=True,
    )  # fmt: skip


@pytest.fixture
def repository(made, tmp_path):
    """A DVC repository with two revisions of a mixture, and a remote beside it."""
    folder = tmp_path / "repository"
    folder.mkdir()

    def dvc(*arguments):
        command = [sys.executable, "-m", "dvc", *arguments]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)

    git(folder, "init", "-q")
    dvc("init", "-q")
    dvc("remote", "add", "-d", "store", str(tmp_path / "store"))
    for tag, preset in (("v1", "rings"), ("v2", "digits")):
        (folder / "mixture").mkdir(exist_ok=True)
        for name in ("mixture.json", "mixture.safetensors"):
            (folder / "mixture" / name).unlink(missing_ok=True)
            content = (made / preset / "mixture" / name).read_bytes()
            (folder / "mixture" / name).write_bytes(content)
        dvc("add", "-q", "mixture")
        dvc("push", "-q")
        git(folder, "add", "-A")
        git(folder, "commit", "-qm", tag)
        git(folder, "tag", tag)
    return folder


@pytest.mark.filterwarnings(  # DVC leaves its clones' packs to the garbage collector
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_a_mixture_of_any_revision_by_its_address(repository, cpmm, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for revision, n in (("@v1", 6), ("@v2", 30), ("", 30)):
        address = f"dvc+file://{repository}{revision}#mixture"
        status, printed, said = cpmm("info", address, "--json")
        assert status == 0, said
        assert json.loads(printed)["components"] == n
    with mixture_folder(f"dvc+{repository}@v1#mixture") as folder:
        assert (folder / "mixture.json").is_file()
    assert not folder.exists()
    for address, named in (
        ("@v3#mixture", "v3"),
        ("@v1#mix", "mix"),
        ("x@v1#mixture", "repositoryx"),
    ):
        status, _, said = cpmm("info", f"dvc+file://{repository}{address}")
        assert status == 1, address
        assert named in said
        assert said.splitlines()[-1].startswith("cpmm: error: ")
    assert not list(tmp_path.rglob("*dvc-c*"))  # clones, and their caches
    gc.collect()  # here, where its warnings are let pass


def test_help_is_quick_and_both_names_work():
    for command in (["-m", "cpmm"], ["-m", "cpmm.cli.main"]):
        done = subprocess.run(
            [sys.executable, *command, "--help"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert "usage: cpmm" in done.stdout
    code = "import sys, cpmm.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


WITHOUT = """
import json, sys
from unittest.mock import patch

missing, commands = map(json.loads, sys.argv[1:])

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
from cpmm.cli.main import main
for arguments in commands:
    with patch.object(sys, "argv", ["cpmm", *arguments]):
        main()
"""


def without(modules, *commands):
    """Run commands where some modules are not installed; return the status and the last line."""
    lines = [[*map(str, command)] for command in commands]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, json.dumps(modules), json.dumps(lines)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr.strip().split("\n")[-1]


def test_the_commands_need_no_extra_but_that_of_the_command_line(made, tmp_path):
    mixture, points = made / "digits" / "mixture", tmp_path / "points.csv"
    others = [name for extra, names in EXTRAS.items() if extra != "cli" for name in names]
    commands = [
        ("sample", mixture, "-n", 3, "--out", points), ("info", mixture), ("score", mixture, points),
        ("predict", mixture, points), ("plot", mixture, "--out", tmp_path / "a.png"),
    ]  # fmt: skip
    assert without(others, *commands) == (0, f"plot: means -> {tmp_path / 'a.png'}")
    assert without([*others, *EXTRAS["cli"]], ("info", mixture))[0] == 0


@pytest.mark.parametrize(
    ("missing", "command", "line"),
    [
        ("pandas", "sample {mixture}", "pandas is not installed: pip install 'cpmm[cli]'"),
        ("rich", "sample {mixture}", "rich is not installed: pip install 'cpmm[cli]'"),
        (
            "matplotlib",
            "plot {mixture} --out a.png",
            "matplotlib is not installed: pip install 'cpmm[cli]'",
        ),
        (
            "onnxscript",
            "export {mixture} --out a.onnx",
            "onnxscript is not installed: pip install 'cpmm[onnx]'",
        ),
        ("dvc", "info dvc+.#a/mixture", "dvc+... needs DVC: pip install 'cpmm[workflow]'"),
    ],
)
def test_a_missing_extra_is_named_in_one_line(missing, command, line, made):
    words = command.format(mixture=made / "rings" / "mixture").split()
    assert without([missing], words) == (1, f"cpmm: error: {line}")


def test_a_reader_that_stops_early_is_no_error(made):
    command = f"{sys.executable} -m cpmm sample {made}/rings/mixture -n 100000 | head -2"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith("x0,x1,cluster\n")
    assert done.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["csv", "npy"])
def test_memory_does_not_grow_with_the_input(ending, made, tmp_path):
    def peak(n):
        path = tmp_path / f"{n}.{ending}"
        x = np.random.default_rng(0).integers(0, 17, (n, 64), np.uint8)
        if ending == "npy":
            np.save(path, x.astype(float))
        else:
            names = FittedMixture.load(made / "digits" / "mixture").feature_names
            pd.DataFrame(x, columns=list(names)).to_csv(path, index=False)
        arguments = [
            "score",
            str(made / "digits" / "mixture"),
            str(path),
            "--out",
            str(tmp_path / "out.csv"),
        ]
        code = (
            "import sys; from cpmm.cli.main import main; main(); "
            "print(open('/proc/self/status').read())"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert len(pd.read_csv(tmp_path / "out.csv")) == n
        kib = int(done.stdout.split("VmHWM:")[1].split()[0])
        return kib / 1024, path.stat().st_size / 2**20

    small, _ = peak(10_000)
    large, size = peak(400_000)
    print(f"{size:.0f} MiB of {ending}: peak {large:.0f} MiB, of 10000 rows {small:.0f} MiB")
    assert large - small < 0.2 * size
