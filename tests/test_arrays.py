"""Files of arrays: whole ones of any type are read, the others are named with what to do."""

from __future__ import annotations

import re
import struct
from contextlib import suppress
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from cpmm.reading.arrays import arrange, arrange_like, grey_levels, map_npy, real_values

REAL = ["?", *(f"{order}{kind}" for order in "<>" for kind in ("u2", "u8", "i4", "f2", "f8", "g"))]


def raises(*parts: object, error: type[Exception] = ValueError):
    """Expect an error whose one message names all ``parts``, in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(re.escape(str(part)) for part in parts))


def save(folder: Path, x: np.ndarray, **how: object) -> Path:
    np.save(folder / "x.npy", x, **how)
    return folder / "x.npy"


@pytest.mark.parametrize("dtype", REAL)
def test_numbers_of_every_type_are_the_same_numbers(tmp_path, dtype):
    x = np.arange(12).reshape(3, 4) % 2
    path = save(tmp_path, np.asfortranarray(x.astype(dtype)))
    read = map_npy(path)
    assert real_values(path, read, "abcd").tolist() == x.tolist()
    assert grey_levels(path, read, 2).tolist() == x.tolist()


@pytest.mark.parametrize(
    ("x", "parts"),
    [
        (np.ones((2, 2), complex), ["complex numbers", "x.real"]),
        (np.zeros((2, 2), "M8[s]"), ["dates", "np.timedelta64(1, 'D')"]),
        (np.zeros((2, 2), "m8[s]"), ["lengths of time"]),
        (np.zeros((2, 2), "U4"), ["text", "x.astype(float)"]),
        (np.zeros(2, [("a", float), ("b", int)]), ["records with the fields a, b", "np.stack"]),
        (np.zeros((2, 2), "V2"), ["raw bytes, such as of bfloat16"]),
        (np.array([[1, None]]), ["Python objects", "allow_pickle=True"]),
        (np.zeros((0, 3)), ["no rows", "(0, 3)"]),
        (np.zeros((3, 0), int), ["no rows or no values", "(3, 0)"]),
    ],
)
def test_values_that_are_no_numbers_are_named(tmp_path, x, parts):
    with raises(tmp_path / "x.npy", *parts):
        map_npy(save(tmp_path, x, allow_pickle=True))


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ["empty: download"]),
        (b"\n<!DOCTYPE html><p>", ["a web page"]),
        (b"version https://git-lfs.github.com/spec/v1\noid", ["git LFS", "git lfs pull"]),
        (b"MATLAB 5.0 MAT-file, Platform: GLNXA64", ["a MATLAB file", "['X']", "axes=HWCN"]),
        (b"\x89PNG\r\n\x1a\n\0\0", ["a picture", "np.stack", "axes=NHWC"]),
        (b"\x80\x04\x95", ["a Python pickle"]),
        (b"a,b\n1,2\n", ["text", "preset csv"]),
        (b"\x1f\x8b\x08", ["gzip", "gunzip"]),
        (b"\0\1\2", ["not a whole .npy file", "np.save"]),
    ],
)
def test_other_files_are_named_for_what_they_are(tmp_path, content, parts):
    path = tmp_path / "x.npy"
    path.write_bytes(content)
    with raises(path, *parts):
        map_npy(path)


def test_the_way_out_of_an_archive_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("mnist.npz", y_train=np.ones(3), x_train=np.ones((3, 2)))
    with raises("mnist.npz is an archive of arrays (y_train, x_train)") as caught:
        map_npy("mnist.npz")
    exec(re.search(r"np\.save.*", str(caught.value))[0], {"np": np})
    assert map_npy("x_train.npy").shape == (3, 2)


def test_a_sparse_matrix_is_named(tmp_path):
    parts = {"data": np.ones(1), "indices": np.zeros(1, int), "indptr": np.arange(2)}
    np.savez(tmp_path / "x.npz", shape=(1, 1), format=b"csr", **parts)
    with raises("x.npz is a sparse matrix", "scipy.sparse.load_npz", "toarray"):
        map_npy(tmp_path / "x.npz")


def test_rows_of_cifar_are_unpacked_as_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = np.random.default_rng(0).integers(0, 256, (5, 3073), dtype=np.uint8)
    rows.tofile("data_batch_1.bin")
    with raises("CIFAR-10", "labels in column 0") as caught:
        map_npy("data_batch_1.bin")
    exec(re.search(r"np\.save.*\)(?=, labels)", str(caught.value))[0], {"np": np})
    assert np.array_equal(map_npy("x.npy").reshape(5, -1), rows[:, 1:])


def test_a_folder_or_nothing_is_named(tmp_path):
    with raises(tmp_path, "a folder", "np.stack"):
        map_npy(tmp_path)
    with raises("there is no file", error=FileNotFoundError):
        map_npy(tmp_path / "none.npy")


def test_file_cut_anywhere_is_an_error(tmp_path):
    path = save(tmp_path, np.ones((3, 2)))
    data = path.read_bytes()
    for n_bytes in range(1, len(data)):
        path.write_bytes(data[:n_bytes])
        with raises(path, "not a whole .npy file"):
            map_npy(path)


@pytest.mark.parametrize(
    ("head", "part"),
    [
        (
            "'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000, 3)",
            "24000000000000 bytes",
        ),
        ("'descr': '<f8', 'fortran_order': False, 'shape': (99999999999999999999, 3)", "bytes"),
        ("'descr': '<f8', 'fortran_order': False, 'shape': (-2, -3)", "no array has"),
        ("'descr': '<f8', 'fortran_order': False, 'shape': (2, True)", "no array has"),
        ("'descr': ('<f8', (2,)), 'fortran_order': False, 'shape': (2, 3)", "no array has"),
        ("[]: 3", "unhashable"),
    ],
)
def test_header_that_lies_is_named_before_memory_is_asked_for(tmp_path, head, part):
    path = tmp_path / "x.npy"
    head = f"{{{head}, }}\n".encode()
    path.write_bytes(b"\x93NUMPY\1\0" + struct.pack("<H", len(head)) + head + bytes(48))
    with raises(path, "not a whole .npy file", part):
        map_npy(path)


def test_header_of_python_2_is_read(tmp_path):
    path = tmp_path / "x.npy"
    head = b"{'descr': '<f8', 'fortran_order': False, 'shape': (2L, 3L), }\n"
    path.write_bytes(b"\x93NUMPY\1\0" + struct.pack("<H", len(head)) + head + bytes(48))
    assert map_npy(path).tolist() == [[0, 0, 0], [0, 0, 0]]


def test_bytes_too_many_are_not_read_shifted(tmp_path):
    path = save(tmp_path, np.ones((3, 2)))
    data = path.read_bytes()
    for place in (len(data), len(data) - 20):
        path.write_bytes(data[:place] + b"?" + data[place:])
        with raises(path, "48 bytes, and 49 follow"):
            map_npy(path)


@pytest.mark.parametrize(
    ("x", "levels", "parts"),
    [
        ([0, 0.25], 17, ["got 0.25 in image 8", "0.0 to 0.25", "np.round(16 * x).astype"]),
        ([-1, 1], 256, ["got -1 in image 8", "np.round(255 * (x + 1) / 2)"]),
        ([3.5, 2.0], 256, ["got 3.5", "np.round(x).astype(np.uint8)"]),
        ([0, 256], 256, ["0 to 255", "got 256", "0 to 256"]),
        (np.array([0, 2**64 - 1], np.uint64), 256, ["got 18446744073709551615"]),
        ([np.nan, 1], 256, ["got nan", "drop"]),
        ([np.inf, 1], 256, ["got inf", "drop"]),
    ],
)
def test_values_that_are_no_grey_levels_are_named(x, levels, parts):
    with raises("x.npy must hold whole grey levels", *parts):
        grey_levels("x.npy", np.array([x]), levels, n_before=7)


@pytest.mark.parametrize("n", [500, 8, 3, 1])
@pytest.mark.parametrize("image", [(3, 6, 8), (3, 8, 8), (1, 6, 8), (4, 4, 3), (3, 3, 3)])
def test_axes_in_any_order_are_right_or_refused_and_right_once_named(n, image):
    """What no shape tells, height from width of square images, is left out."""
    x = np.arange(n * np.prod(image)).reshape(n, *image)
    size = int(np.prod(image))
    for order in permutations("NCHW"):
        axes = "".join(order)
        stored = x.transpose(["NCHW".index(letter) for letter in axes])
        assert np.array_equal(arrange_like("x.npy", stored, axes, image, size), x)
        assert np.array_equal(arrange("x.npy", stored, axes), x)
        if image[1] == image[2] and axes.index("H") > axes.index("W"):
            continue
        with suppress(ValueError):
            assert np.array_equal(arrange_like("x.npy", stored, None, image, size), x)
    if n == 500 and len({n, *image}) >= 3 and image[0] not in image[1:]:
        assert np.array_equal(arrange_like("x.npy", x, None, image, size), x)


@pytest.mark.parametrize(
    ("shape", "axes"),
    [((500, 3, 8, 8), "NCHW"), ((500, 1, 8, 8), "NCHW"), ((500, 8, 8, 1), "NHWC"),
     ((500, 28, 20), "NHW")],
)  # fmt: skip
def test_sizes_that_leave_no_doubt_need_no_name(shape, axes):
    x = np.zeros(shape, np.uint8)
    assert arrange("x.npy", x, None).shape == arrange("x.npy", x, axes).shape


@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ((500, 4, 4, 3), ["500 images of 4 channels of 4 x 3 with data.options.axes=NCHW", "or",
                          "500 images of 3 channels of 4 x 4 with data.options.axes=NHWC"]),
        ((32, 32, 3, 900), ["900 images of 3 channels of 32 x 32 with data.options.axes=HWCN"]),
        ((900, 32, 32, 3), ["data.options.axes=NHWC"]),
        ((900, 12, 8, 8), ["data.options.axes=NCHW", "data.options.axes=NHWC"]),
        ((28, 28, 500), ["500 images of 28 x 28 with data.options.axes=HWN"]),
        ((8, 8, 8), ["data.options.axes=NHW", "data.options.axes=HWN"]),
        ((640, 480, 3), ["640 images of 480 x 3 with data.options.axes=NHW"]),
    ],
)  # fmt: skip
def test_sizes_of_doubt_are_refused_with_the_readings(shape, parts):
    with raises("the order of the axes of x.npy", "not certain", *parts):
        arrange("x.npy", np.zeros(shape, np.uint8), None)


@pytest.mark.parametrize(
    ("shape", "axes", "image", "parts"),
    [
        ((5, 4), None, None, ["(N, 6)", "got float64 of shape (5, 4)"]),
        ((5, 2, 3), None, None, ["(N, 6)", "(5, 2, 3)"]),
        ((6,), None, None, ["(N, 6)", "save x[None]"]),
        ((5, 2, 3), "NHW", None, ["--axes is NHW, but the mixture is of a table"]),
        ((2, 3), None, (1, 2, 3), ["(N, 2, 3) or (N, 1, 2, 3) or (N, 6)", "save x[None]"]),
        ((5, 6), "NHW", (1, 2, 3), ["--axes NHW does not fit", "a table"]),
        ((5, 3, 4), "NHW", (1, 2, 3), ["got float64 of shape (5, 3, 4)", "by --axes NHW"]),
        ((5, 3, 2), None, (1, 2, 3), ["(5, 3, 2)", "5 images of 2 x 3 with --axes NWH"]),
        ((5, 1, 6), None, (1, 2, 3), ["(5, 1, 6)"]),
        ((5, 2, 3), "NXY", (1, 2, 3), ["--axes NXY does not fit", "such as NHWC"]),
    ],
)
def test_points_of_other_sizes_than_the_mixture_are_refused(shape, axes, image, parts):
    with raises("", *parts):
        arrange_like("x.npy", np.zeros(shape), axes, image, 6)


def test_flat_images_are_taken():
    x = np.zeros((5, 6))
    assert arrange_like("x.npy", x, None, (1, 2, 3), 6) is x
    assert arrange_like("x.npy", x, None, None, 6) is x
