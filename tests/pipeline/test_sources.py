from __future__ import annotations

import gzip
import hashlib
import re
import struct
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from cpmm.datasets import rings, spiral
from cpmm.pipeline.artifacts.sources import SOURCES, Source, read_source

RINGS = {
    "source": "rings",
    "n": 30,
    "seed": 7,
    "radius": 1.0,
    "ratio": 1.1,
    "thickness": 0.012,
    "gaps": [60.0, 240.0],
    "gap_width": 50.0,
}
SPIRAL = {
    "source": "spiral",
    "n": 60,
    "seed": 7,
    "arms": 3,
    "start": 0.15,
    "twist": 120.0,
    "noise": 0.025,
    "outlier_fraction": 0.1,
}
CSV = {
    "source": "csv",
    **dict.fromkeys(["label_column", "delimiter", "decimal", "encoding", "header"]),
    "table": {
        "columns": None,
        "drop": [],
        "missing": "refuse",
        "constant": "refuse",
        "text": "refuse",
    },
}
FILES = {
    "train_images": "train-images-idx3-ubyte.gz",
    "train_labels": "train-labels-idx1-ubyte.gz",
    "test_images": "t10k-images-idx3-ubyte.gz",
    "test_labels": "t10k-labels-idx1-ubyte.gz",
}


def raises(error: type[Exception], *parts: object):
    """Expect an error whose one message names all ``parts``, in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(re.escape(str(part)) for part in parts))


def pack(array: np.ndarray) -> bytes:
    """Write IDX by its published description, http://yann.lecun.com/exdb/mnist."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


class Idx:
    """A tiny data set in the IDX format, and a config that reads it."""

    def __init__(self, folder: Path) -> None:
        random = np.random.default_rng(0)
        self.array = {
            "train_images": random.integers(0, 256, (5, 3, 2), dtype=np.uint8),
            "train_labels": np.array([2, 0, 1, 1, 2], dtype=np.uint8),
            "test_images": random.integers(0, 256, (2, 3, 2), dtype=np.uint8),
            "test_labels": np.array([0, 2], dtype=np.uint8),
        }
        self.folder = folder / "raw"
        self.folder.mkdir()
        for role, array in self.array.items():
            self.write(role, gzip.compress(pack(array)))
        self.config = {
            "source": "idx",
            "folder": str(self.folder),
            "mirror": None,
            "cache": str(folder / "cache"),
            "files": FILES,
            "md5": {role: hashlib.md5(pack(a)).hexdigest() for role, a in self.array.items()},
            "class_names": ["ant", "bee", "cat"],
            "axes": None,
        }

    def path(self, role: str) -> Path:
        return self.folder / FILES[role]

    def write(self, role: str, data: bytes) -> None:
        self.path(role).write_bytes(data)

    def read(self, **options: object) -> Source:
        return read_source({**self.config, **options})


@pytest.fixture
def idx(tmp_path: Path) -> Idx:
    return Idx(tmp_path)


@pytest.fixture
def mirror(idx: Idx, monkeypatch: pytest.MonkeyPatch):
    """Serve the files of ``idx``; records the paths asked for, and can cut answers short."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.server.asked.append(self.path)
            file = idx.folder / self.path.rsplit("/", 1)[1]
            if not file.exists():
                self.send_error(404)
                return
            data = file.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: self.server.limit])

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked, server.limit = [], None
        server.url = f"http://127.0.0.1:{server.server_address[1]}/mnist"
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def csv(tmp_path: Path, text: str, **options: object) -> Source:
    path = tmp_path / "table.csv"
    path.write_text(text)
    return read_source({**CSV, "path": str(path), **options})


def npy(
    tmp_path: Path,
    x: np.ndarray,
    label: np.ndarray | None = None,
    levels: int = 256,
    axes: str | None = None,
) -> Source:
    np.save(tmp_path / "x.npy", x)
    if label is not None:
        np.save(tmp_path / "label.npy", label)
    return read_source(
        {
            "source": "npy",
            "path": str(tmp_path / "x.npy"),
            "label_path": None if label is None else str(tmp_path / "label.npy"),
            "levels": levels,
            "axes": axes,
        }
    )


# dispatch


@pytest.mark.parametrize("config", [{}, {"source": "mnits"}, {"source": {"source": "digits"}}])
def test_unknown_source_lists_the_known(config):
    with raises(ValueError, repr(config.get("source")), *SOURCES):
        read_source(config)


def test_unknown_option_lists_the_known():
    with raises(ValueError, "'rings' does not know data.color, data.size", *list(RINGS)[1:]):
        read_source({**RINGS, "size": 3, "color": "red"})
    with raises(ValueError, "'digits' does not know data.n", "options are none"):
        read_source({"source": "digits", "n": 3})


def test_missing_option_lists_the_known():
    with raises(ValueError, "'spiral' needs data.arms, data.seed", *list(SPIRAL)[1:]):
        read_source({k: v for k, v in SPIRAL.items() if k not in ("arms", "seed")})


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_keeps_the_contract(kind, tmp_path, idx):
    source = {
        "digits": lambda: read_source({"source": "digits"}),
        "rings": lambda: read_source(RINGS),
        "spiral": lambda: read_source(SPIRAL),
        "idx": idx.read,
        "csv": lambda: csv(tmp_path, "a,b,c\n1,2,u\n3,4,v\n", label_column="c"),
        "npy": lambda: npy(
            tmp_path, np.full((4, 2, 3, 5), 9, dtype=np.uint8), np.arange(4), axes="NCHW"
        ),
    }[kind]()
    n_points, n_features = source.x.shape
    assert source.x.dtype == (np.float64 if source.levels is None else np.uint8)
    assert len(source.feature_names) == len(set(source.feature_names)) == n_features
    assert source.label.shape == (n_points,)
    assert source.label.dtype == np.int64
    assert -1 <= source.label.min() <= source.label.max() < len(source.class_names)
    if source.image_shape:
        assert np.prod(source.image_shape) == n_features
        assert source.x.max() < source.levels
    torch.from_numpy(source.x)  # warns, and so fails, where the array cannot be written to


# embedded and synthetic


def test_digits_are_those_of_scikit_learn():
    source, expected = read_source({"source": "digits"}), load_digits()
    assert np.array_equal(source.x, expected.data)
    assert np.array_equal(source.label, expected.target)
    assert source.feature_names == tuple(expected.feature_names)
    assert (source.levels, source.image_shape, source.official_test) == (17, (1, 8, 8), 0)


@pytest.mark.parametrize(("config", "draw"), [(RINGS, rings), (SPIRAL, spiral)])
def test_synthetic_sets_are_drawn_from_the_seed(config, draw):
    options = {k: v for k, v in config.items() if k not in ("source", "seed")}
    x, label = draw(generator=np.random.default_rng(7), **options)
    source = read_source(config)
    assert np.array_equal(source.x, x)
    assert np.array_equal(source.label, label)
    assert len(source.class_names) == label.max() + 1


# idx


def test_idx_reads_train_then_test(idx):
    source = idx.read()
    images = [*idx.array["train_images"], *idx.array["test_images"]]
    assert [x.reshape(3, 2).tolist() for x in source.x] == [i.tolist() for i in images]
    assert source.label.tolist() == [2, 0, 1, 1, 2, 0, 2]
    assert (source.official_test, source.image_shape, source.levels) == (2, (1, 3, 2), 256)
    assert source.class_names == ("ant", "bee", "cat")
    assert source.feature_names[3] == "pixel_1_1"


def test_idx_takes_files_with_or_without_gz(idx):
    for role in FILES:
        path = idx.path(role)
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    plain = {role: name.removesuffix(".gz") for role, name in FILES.items()}
    assert np.array_equal(idx.read().x, idx.read(files=plain).x)
    idx.path("train_images").with_suffix("").unlink()
    idx.write("train_images", gzip.compress(pack(idx.array["train_images"])))
    assert np.array_equal(idx.read(files=plain).x, idx.read().x)


def test_idx_checks_no_md5_that_is_null(idx):
    changed = pack(idx.array["test_labels"][::-1].copy())
    idx.write("test_labels", changed)
    for md5 in (None, {}, {**idx.config["md5"], "test_labels": None}):
        assert idx.read(md5=md5).label.tolist()[-2:] == [2, 0]


def test_idx_missing_file_says_where_it_looked(idx):
    idx.path("test_labels").unlink()
    name, cache = FILES["test_labels"], idx.config["cache"]
    looked = [f"{place}/{n}" for place in (idx.folder, cache) for n in (name, name[:-3])]
    with raises(
        FileNotFoundError, name, *looked, "set data.options.folder", "or data.options.mirror"
    ):
        idx.read()
    with raises(
        FileNotFoundError, FILES["train_images"], "nowhere", "null", "set data.options.folder"
    ):
        idx.read(folder=None, cache=None)


def test_idx_files_must_be_the_four_roles(idx):
    three = {role: name for role, name in FILES.items() if role != "test_labels"}
    with raises(ValueError, "data.options.files must name", *FILES, "got files", *three):
        idx.read(files=three)
    with raises(ValueError, "data.options.md5 no others", "md5 validation"):
        idx.read(md5={"validation": "0"})


@pytest.mark.parametrize("compress", [gzip.compress, bytes])
def test_idx_file_cut_anywhere_is_an_error(idx, compress):
    data = compress(pack(idx.array["train_labels"]))
    for n_bytes in range(len(data)):
        idx.write("train_labels", data[:n_bytes])
        with raises(ValueError, idx.path("train_labels"), "replace the file"):
            idx.read(md5=None)


def test_idx_damaged_gzip(idx):
    data = bytearray(gzip.compress(pack(idx.array["train_images"])))
    data[-6] ^= 1  # the checksum at the end
    idx.write("train_images", bytes(data))
    with raises(ValueError, idx.path("train_images"), "damaged, gzip says: CRC", "replace"):
        idx.read()


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"<!DOCTYPE html><p>not found</p>", ["a web page", "replace the file"]),
        (b"MATLAB 5.0 MAT-file", ["a MATLAB file", "np.save", "axes=HWCN"]),
        (b"version https://git-lfs.github.com/spec/v1", ["git lfs pull"]),
        (b"\x93NUMPY\1\0", ["a .npy file", "preset npy"]),
        (b"\0\0\7\1", ["begins with 00000701", "4 bytes"]),
        (b"", ["empty"]),
    ],
)
def test_idx_other_files_are_named_for_what_they_are(idx, content, parts):
    idx.write("train_images", content)
    with raises(ValueError, idx.path("train_images"), "IDX format, of train_images", *parts):
        idx.read()


def test_idx_files_in_each_others_place(idx):
    images, labels = (pack(idx.array[f"train_{what}"]) for what in ("images", "labels"))
    idx.write("train_images", labels)
    with raises(ValueError, "images", "got uint8 of shape (5,)", "data.options.files.train_images"):
        idx.read(md5=None)
    idx.write("train_images", images)
    idx.write("train_labels", images)
    with raises(ValueError, "labels", "got uint8 of shape (5, 3, 2)", "files.train_labels"):
        idx.read(md5=None)


def test_idx_labels_of_qmnist_are_its_first_column(idx):
    label = np.arange(40).reshape(5, 8).astype(">i4")
    label[:, 0] = idx.array["train_labels"]
    data = struct.pack(">HBB2I", 0, 12, 2, *label.shape) + label.tobytes()
    idx.write("train_labels", gzip.compress(data))
    assert idx.read(md5=None).label.tolist() == [2, 0, 1, 1, 2, 0, 2]


def test_idx_images_of_other_types_and_axes(idx):
    random = np.random.default_rng(0)
    x = {split: random.integers(0, 256, (n, 3, 2, 4)) for split, n in (("train", 5), ("test", 2))}
    for dtype, code in ((">i2", 11), (">f4", 13)):
        for split, images in x.items():
            stored = images.transpose(2, 3, 1, 0).astype(dtype)  # HWCN
            head = struct.pack(">HBB4I", 0, code, 4, *stored.shape)
            idx.write(f"{split}_images", head + stored.tobytes())
        source = idx.read(md5=None, axes="HWCN")
        assert source.image_shape == (3, 2, 4)
        assert source.x.tolist() == np.concatenate([*x.values()]).reshape(7, -1).tolist()
        with raises(ValueError, "order of the axes", "not certain"):
            idx.read(md5=None)


def follow(said: str) -> dict[str, object]:
    """Options of a source that a message says to set."""
    options: dict[str, object] = {"files": {}}
    for name, value in re.findall(r"data\.options\.([\w.]+)=([\w.-]+)", said):
        if name.startswith("files."):
            options["files"][name.removeprefix("files.")] = value
        else:
            options[name] = None if value == "null" else value
    return options


def test_idx_names_of_emnist_are_found_and_the_way_out_works(idx):
    for role, array in idx.array.items():
        idx.path(role).unlink()
        stored = array.transpose(0, 2, 1) if "images" in role else array + 1
        split = role.split("_")[0]
        what = "images-idx3" if "images" in role else "labels-idx1"
        name = f"emnist-letters-{split}-{what}-ubyte.gz"
        (idx.folder / name).write_bytes(gzip.compress(pack(stored)))
    with raises(FileNotFoundError, "is missing", "other names", "axes=NWH") as caught:
        idx.read()
    source = idx.read(**follow(str(caught.value)))
    images = [*idx.array["train_images"], *idx.array["test_images"]]
    assert [x.reshape(3, 2).tolist() for x in source.x] == [i.tolist() for i in images]
    assert source.class_names == ("1", "2", "3")
    assert source.label.tolist() == [2, 0, 1, 1, 2, 0, 2]


def test_idx_what_the_folder_holds_instead_is_named(idx, tmp_path):
    with raises(FileNotFoundError, f"{idx.folder} has such files: set data.options.folder"):
        idx.read(folder=str(tmp_path))
    other = tmp_path / "svhn"
    other.mkdir()
    (other / "train_32x32.mat").write_bytes(b"MATLAB 5.0 MAT-file, Platform")
    with raises(FileNotFoundError, "train_32x32.mat is a MATLAB file", "np.save", "preset npy"):
        idx.read(folder=str(other))
    with raises(FileNotFoundError, f"there is no folder {other}s"):
        idx.read(folder=f"{other}s")


@pytest.mark.parametrize("surplus", [b"", b"xy"])
def test_idx_dimensions_must_match_the_payload(idx, surplus):
    data = pack(idx.array["test_images"])
    idx.write("test_images", data + surplus if surplus else data[:-1])
    got = 14 if surplus else 11
    with raises(ValueError, idx.path("test_images"), "(2, 3, 2), 12 bytes", f"got {got} bytes"):
        idx.read()


def test_idx_without_images(idx):
    idx.write("test_images", pack(np.empty((0, 3, 2), dtype=np.uint8)))
    with raises(ValueError, idx.path("test_images"), "(0, 3, 2)"):
        idx.read()


def test_idx_wrong_md5(idx):
    expected = idx.config["md5"]["train_labels"]
    data = pack(idx.array["train_labels"][::-1].copy())
    idx.write("train_labels", data)
    found = hashlib.md5(data).hexdigest()
    with raises(ValueError, idx.path("train_labels"), expected, f"got {found}", "replace"):
        idx.read()


def test_idx_files_must_belong_together(idx):
    idx.write("train_labels", pack(np.zeros(4, dtype=np.uint8)))
    with raises(ValueError, FILES["train_images"], "5 images", FILES["train_labels"], "4 labels"):
        idx.read(md5=None)
    idx.write("train_labels", pack(idx.array["train_labels"]))
    idx.write("test_images", pack(np.zeros((2, 2, 3), dtype=np.uint8)))
    with raises(ValueError, "training images are (1, 3, 2), test images (1, 2, 3)"):
        idx.read(md5=None)


def test_idx_needs_a_name_for_every_label(idx):
    with raises(ValueError, "labels are 0 to 2", "has 2 names", "give 3, or null"):
        idx.read(class_names=["ant", "bee"])


def test_idx_downloads_once(idx, mirror):
    expected = idx.read().x
    cache = Path(idx.config["cache"])
    assert not cache.exists()
    for url in (mirror.url, f"{mirror.url}/"):
        assert np.array_equal(idx.read(folder=None, mirror=url).x, expected)
        assert sorted(mirror.asked) == sorted(f"/mnist/{name}" for name in FILES.values())
    assert sorted(p.name for p in cache.iterdir()) == sorted(FILES.values())
    assert np.array_equal(idx.read(folder=None).x, expected)


def test_idx_prefers_the_folder_to_the_mirror(idx, mirror):
    idx.read(mirror=mirror.url)
    assert mirror.asked == []


def test_idx_failed_download_says_what_to_do(idx, mirror):
    idx.path("train_images").unlink()
    name = FILES["train_images"]
    with raises(
        ConnectionError, name, idx.folder, f"{mirror.url}/{name}", "404", "data.options.folder"
    ):
        idx.read(mirror=mirror.url)


@pytest.mark.parametrize("damage", ["cut answer", "wrong content"])
def test_idx_bad_download_is_not_kept(idx, mirror, damage):
    if damage == "cut answer":
        mirror.limit, error = 20, ConnectionError
    else:
        idx.write("train_images", gzip.compress(pack(idx.array["train_images"][::-1].copy())))
        error = ValueError
    with raises(
        error, f"{mirror.url}/{FILES['train_images']}", "data.options.mirror to another address"
    ):
        idx.read(folder=None, mirror=mirror.url)
    assert not list(Path(idx.config["cache"]).glob("*"))


@pytest.mark.parametrize("wrong", [{"mirror": "file:///etc"}, {"mirror": "ftp://a/b"}])
def test_idx_mirror_must_be_http(idx, wrong):
    with raises(ValueError, "http or https", wrong["mirror"]):
        idx.read(**wrong)


def test_idx_mirror_needs_a_cache(idx):
    with raises(ValueError, "data.options.cache", "cache None"):
        idx.read(mirror="https://example.org", cache=None)


# csv


def test_csv_splits_features_from_labels(tmp_path):
    source = csv(tmp_path, "b,kind,a\n1,oak,2.5\n-3,elm,4e1\n5,oak,1\n", label_column="kind")
    assert source.x.tolist() == [[1, 2.5], [-3, 40], [5, 1]]
    assert source.feature_names == ("b", "a")
    assert source.label.tolist() == [1, 0, 1]
    assert source.class_names == ("elm", "oak")
    assert (source.official_test, source.image_shape, source.levels) == (0, None, None)


def test_csv_without_labels(tmp_path):
    source = csv(tmp_path, "a;b\n1; 2\n3;4\n", delimiter=";")
    assert source.x.tolist() == [[1, 2], [3, 4]]
    assert source.label is None
    assert source.class_names == ()


def test_csv_integer_classes_are_sorted_as_numbers(tmp_path):
    source = csv(tmp_path, "a,c\n1,10\n2,9\n1,2\n1,10\n", label_column="c")
    assert source.class_names == ("2", "9", "10")
    assert source.label.tolist() == [2, 1, 0, 2]


def test_csv_row_without_a_class_is_no_member(tmp_path):
    classes = ("None", "", "-1", " x ", "-1.0", "NaN", "NA", "noise")
    rows = "".join(f"{m},{name}\n" for m, name in enumerate(classes))
    source = csv(tmp_path, f"a,c\n{rows}", label_column="c")
    assert source.class_names == ("None", "x")
    assert source.label.tolist() == [0, -1, -1, 1, -1, -1, -1, -1]
    found = "6 of 8 rows without a label (empty, '-1', '-1.0', 'NA', 'NaN')"
    assert source.found[-1] == found
    numbers = csv(tmp_path, "a,c\n1,1\n2,1.0\n3,2\n", label_column="c")
    assert (numbers.class_names, numbers.label.tolist()) == (("1", "2"), [0, 0, 1])
    rows = "".join(f"{m % 3},{m}.5\n" for m in range(20))
    (doubt,) = csv(tmp_path, f"a,c\n{rows}", label_column="c").doubts
    assert doubt.startswith("the 20 labels are numbers that all differ")
    with raises(ValueError, "column 'c' of", "has no label", "set its label option to null"):
        csv(tmp_path, "a,c\n1,\n2,-1\n", label_column="c")


def test_csv_header_may_count_the_columns(tmp_path):
    assert csv(tmp_path, "0,1\n5,6\n").feature_names == ("0", "1")


@pytest.mark.parametrize(
    ("text", "options", "parts"),
    [
        ("", {}, ["is empty", "expected a header"]),
        ("\n \n", {}, ["expected a header"]),
        ("a,b\n", {}, ["a header and no rows"]),
        ("1.5,2\n3,4\n", {}, ["must name the columns", "'1.5', '2'", "add a header"]),
        ("a,b,a,b,c\n1,2,3,4,5\n", {}, ["more than one column named 'a', 'b'"]),
        (",a\n0,1\n", {}, ["without a name: 'Unnamed: 0'", "data.drop=["]),
        ("a,b\n1,2\n", {"label_column": "y"}, ["no column 'y'", "'a', 'b'", "delimiter ','"]),
        ("a\n1\n", {"label_column": "a"}, ["no column but the labels"]),
        ("a,b\n1,2\n3,?\n5,x\n", {}, ["text: 'b' (2 different, 'x' in row 3)", "data.missing="]),
        (
            "a;b\n1;2\n",
            {"delimiter": ","},
            ["has no ','", "but semicolons", "data.options.delimiter=';'"],
        ),
        ("a,b\n1,2\n,4\nNA,6\nnan,8\n", {}, ["gaps: 'a' (3, first in row 2)", "impute"]),
        ("a,b\n1,2\n3,inf\n", {}, ["gaps: 'b' (1, such as inf in row 2)"]),
        ("a,b\n1,2\n3," + "9" * 400 + "\n", {}, ["gaps: 'b' (1, such as inf in row 2)"]),
        ("a,b\n1,2\n3,-1e31\n", {}, ["gaps: 'b' (1, such as -1e+31 in row 2)"]),
        ("a,b\n1,2\n3\n", {}, ["gaps: 'b' (1, first in row 2)"]),
        (
            "a,b\n1,2\n3,4,5\n",
            {},
            ["as many fields", "line 3 has 3 fields, not 2", "mend that line"],
        ),
        ("a,b\n0,2,3\n1,5,6\n", {}, ["without a name: 'Unnamed: 0'", "data.drop=["]),
        ("a,b\n0,2,3\n0,5,6\n", {}, ["header has 2, 'a', 'b', and the rows below have 3"]),
        ("a,b\n1,2\nTrue,4\n", {}, ["text: 'a' (2 different, 'True' in row 2)"]),
    ],
)
def test_csv_errors_name_what_is_wrong(tmp_path, text, options, parts):
    with raises(ValueError, *parts) as caught:
        csv(tmp_path, text, **options)
    assert "table.csv" in str(caught.value)


def test_csv_must_be_utf8(tmp_path):
    path = tmp_path / "latin.csv"
    path.write_bytes("größe,b\n1,2\n".encode("latin-1"))
    with raises(ValueError, path, "UTF-8"):
        read_source({**CSV, "path": str(path)})


@pytest.mark.parametrize("delimiter", ["", "::"])
def test_csv_delimiter_is_one_character(tmp_path, delimiter):
    with raises(ValueError, "data.options.delimiter must be one character", repr(delimiter)):
        csv(tmp_path, "a,b\n1,2\n", delimiter=delimiter)


def test_a_tab_may_be_written_out(tmp_path):
    found = csv(tmp_path, "a\tb\n1\t2\n3\t4\n", delimiter=r"\t")
    assert found.feature_names == ("a", "b")


@pytest.mark.parametrize("path", ["no/such/table.csv", None])
def test_csv_missing_file(path):
    with raises(FileNotFoundError, path, "set data.options.path"):
        read_source({**CSV, "path": path})


# npy


@pytest.mark.parametrize("dtype", ["?", "i1", ">u8", ">i4", "f2", "f4", ">f8", "g"])
def test_npy_table(tmp_path, dtype):
    x = np.arange(6).reshape(3, 2).astype(dtype)
    source = npy(tmp_path, x, np.array(["b", "a", "b"]))
    assert source.x.tolist() == x.astype(float).tolist()
    assert source.label.tolist() == [1, 0, 1]
    assert source.class_names == ("a", "b")
    assert source.feature_names == ("x0", "x1")
    assert (source.image_shape, source.levels) == (None, None)


@pytest.mark.parametrize("dtype", ["u1", ">u2", "i8", "f2", ">f4", "g"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("axes", ["NHW", "HWN", "NCHW", "NHWC", "HWCN", "WCHN"])
def test_npy_images(tmp_path, axes, order, dtype):
    sizes = {"N": 4, "C": 3 if "C" in axes else 1, "H": 2, "W": 3}
    x = np.arange(np.prod([*sizes.values()])).reshape(*sizes.values())  # (N, C, H, W)
    stored = x if "C" in axes else x[:, 0]
    stored = stored.transpose([[n for n in "NCHW" if n in axes].index(n) for n in axes])
    stored = np.asarray(stored, dtype, order=order)
    source = npy(tmp_path, stored, np.array([5, -1, 0, 5]), levels=100, axes=axes)
    assert source.x.tolist() == x.reshape(4, -1).tolist()
    assert source.image_shape == (sizes["C"], 2, 3)
    assert source.levels == 100
    assert source.label.tolist() == [1, -1, 0, 1]
    assert source.class_names == ("0", "5")


def test_npy_channel_names_come_first(tmp_path):
    source = npy(tmp_path, np.full((1, 3, 2, 2), 9, dtype=np.uint8), axes="NCHW")
    assert source.feature_names[3:5] == ("pixel_0_1_1", "pixel_1_0_0")
    assert source.label is None


@pytest.mark.parametrize("label", [[[5.0], [-1.0], [np.nan], [0]], [b"5", b"-1", b"", b"0"]])
def test_npy_labels_of_any_type(tmp_path, label):
    source = npy(tmp_path, np.ones((4, 2)), np.array(label))
    assert source.label.tolist() == [1, -1, -1, 0]
    assert source.class_names == ("0", "5")


@pytest.mark.parametrize(
    ("x", "axes", "parts"),
    [
        (np.zeros(3), None, ["(N, M)", "got float64 of shape (3,)", "save x[:, None]"]),
        (np.zeros((2, 3)), "NHW", ["data.options.axes is NHW", "a table", "set it to null"]),
        (np.zeros((2, 3, 3)), "NHWC", ["axes=NHWC does not fit", "(2, 3, 3)"]),
        (np.zeros((9, 8, 8, 3)), None, ["9 images of 3 channels of 8 x 8", "options.axes=NHWC"]),
        (np.full((1, 2, 2), 255), "NHW", ["up to 255", "256 to 256, and is 17"]),
        (np.eye(2)[None], "NHW", ["nothing but 0 and 1", "set data.options.levels=2"]),
        (np.full((1, 2, 2), 0.5), "NHW", ["got 0.5 in image 1", "save np.round(255 * x)"]),
    ],
)
def test_npy_wrong_arrays(tmp_path, x, axes, parts):
    with raises(ValueError, *parts) as caught:
        npy(tmp_path, x, levels=17, axes=axes)
    assert str(tmp_path / "x.npy") in str(caught.value)


@pytest.mark.parametrize("levels", [None, 0, 257])
def test_npy_levels_of_images(tmp_path, levels):
    with raises(ValueError, "data.options.levels", f"is {levels}"):
        npy(tmp_path, np.full((1, 2, 2), 9, dtype=np.uint8), levels=levels, axes="NHW")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1e31])
def test_npy_values_must_be_finite(tmp_path, value):
    x = np.zeros((4, 3))
    x[2:, 1] = value
    with raises(ValueError, "column 'x1'", tmp_path / "x.npy", f"got {value} in row 3"):
        npy(tmp_path, x)


@pytest.mark.parametrize("label", [np.zeros(3), np.zeros((4, 3), int), np.zeros((), int)])
def test_npy_wrong_labels(tmp_path, label):
    got = f"got {label.dtype} of shape {label.shape}"
    with raises(ValueError, tmp_path / "label.npy", "4 rows", tmp_path / "x.npy", got):
        npy(tmp_path, np.ones((4, 2)), label)


def test_npy_missing_files(tmp_path):
    options = {"label_path": None, "levels": 256, "axes": None}
    with raises(FileNotFoundError, "no/x.npy", "set data.options.path"):
        read_source({"source": "npy", "path": "no/x.npy", **options})
    np.save(tmp_path / "x.npy", np.ones((3, 2)))
    options |= {"path": tmp_path / "x.npy", "label_path": "no/label.npy"}
    with raises(FileNotFoundError, "no/label.npy", "set data.options.label_path"):
        read_source({"source": "npy", **options})
