"""What a file is by its first bytes, for messages on files that are something else."""

from __future__ import annotations

from pathlib import Path

PICTURES = (
    "all pictures, of one size, go into one array: np.save('x.npy', np.stack([np.asarray("
    "PIL.Image.open(p).convert('RGB')) for p in paths])), with data.options.axes=NHWC"
)
# What a file begins with, what that is, and how to come to an array.
KINDS = (
    (b"\x93NUMPY", "a .npy file", "choose preset npy for it, and data.options.path"),
    (
        b"version https://git-lfs",
        "a pointer of git LFS, not the data",
        "run `git lfs pull` where it comes from, or download the file itself",
    ),
    (
        b"MATLAB 5.0 MAT-file",
        "a MATLAB file",
        "np.save('x.npy', scipy.io.loadmat({path!r})['X']) for its array X, and so for its labels "
        "(SVHN's X needs data.options.axes=HWCN)",
    ),
    (
        b"MATLAB 7.3 MAT-file",
        "a MATLAB file",
        "np.save('x.npy', h5py.File({path!r})['X'][()]) for its array X, whose axes come reversed",
    ),
    (b"\x89HDF\r\n", "an HDF5 file", "np.save('x.npy', h5py.File({path!r})['x'][()]), x its array"),
    *(
        (start, "a picture", PICTURES)
        for start in (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*")
    ),
    (b"PAR1", "a Parquet file", "write it as CSV: pandas.read_parquet({path!r}).to_csv('x.csv')"),
    *(
        (
            bytes([0x80, protocol]),
            "a Python pickle, which is not opened, as it may run anything",
            "if you trust it, open it with pickle.load, and save its array with np.save",
        )
        for protocol in range(2, 6)
    ),
    (b"PK\x03\x04", "a zip archive", "unpack it, and give the file of the data"),
    (b"\x1f\x8b", "compressed by gzip", "unpack it: gunzip {path}"),
    (b"BZh", "compressed by bzip2", "unpack it: bunzip2 {path}"),
    (b"\xfd7zXZ", "compressed by xz", "unpack it: unxz {path}"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it, and give the file of the data"),
    (b"Rar!", "a RAR archive", "unpack it, and give the file of the data"),
)
CIFAR = {
    3073: "10 (a label, then 3 x 32 x 32 bytes)",
    3074: "100 (two labels, then 3 x 32 x 32 bytes)",
}


def recognize(path: str | Path, head: bytes, size: int | None = None) -> str | None:
    """Say what a file is and what to do with it, if its first bytes tell.

    Args:
        path: Its name, for the message.
        head: Its first bytes, some hundreds.
        size: Of the whole file, in bytes.

    Returns:
        Such as "is a picture: ..."; None if nothing is known.
    """
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    known = [
        (head.startswith(start), f"is {what}: {remedy.format(path=str(path))}")
        for start, what, remedy in KINDS
    ]
    known += [
        (
            bool(size) and size % row == 0 and str(path).endswith(".bin"),
            f"looks like rows of CIFAR-{which}: np.save('x.npy', np.fromfile({str(path)!r}, "
            f"np.uint8).reshape(-1, {row})[:, {row - 3072}:].reshape(-1, 3, 32, 32)), labels in "
            f"column {row - 3073}",
        )
        for row, which in CIFAR.items()
    ]
    known += [
        (head[257:262] == b"ustar", "is a tar archive: unpack it, and give the file of the data"),
        (not head, "is empty: download or write it again"),
        (
            text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")),
            "is a web page, not the data: see its address in a browser, download the file itself",
        ),
        (
            all(byte >= 32 or byte in b"\t\r\n\f" for byte in head),
            "is text: a table with a header is read by preset csv, as a .csv file; else "
            f"np.save('x.npy', np.loadtxt({str(path)!r}))",
        ),
    ]
    return next((said for is_so, said in known if is_so), None)
