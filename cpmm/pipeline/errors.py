"""How a command ends: in one line where the input or the machine is at fault."""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

EXPECTED_ERRORS = (ValueError, FloatingPointError, OSError, MemoryError)

REMEDIES = {
    errno.ENOSPC: "make space there, and run it again",
    errno.EDQUOT: "make space there, and run it again",
    errno.EROFS: "make it writable, and run it again",
    errno.EACCES: "see to its permissions, and run it again",
    errno.EPERM: "see to its permissions, and run it again",
}

# In what torch says of it, a RuntimeError like any bug.
NO_MEMORY = (
    "allocate memory",
    "out of memory",
    "Storage size calculation overflowed",
    "ALLOC_FAILED",
)

# Modules whose errors are of files, not of the numbers in them.
OF_FILES = ("cpmm.artifact", "cpmm.files", "cpmm.pipeline.artifacts", "zarr")

# The extra of cpmm that brings a module which not every installation has.
EXTRAS = {
    "cli": ("matplotlib", "pandas", "rich"),
    "onnx": ("onnx", "onnxscript"),
    "train": ("pytorch_lightning", "scipy", "sklearn", "torchdiffeq"),
    "workflow": ("dvc", "hydra", "jinja2", "omegaconf", "psutil", "yaml", "zarr"),
    "sweep": ("optuna", "pyarrow", "ray"),
}


@contextmanager
def command(name: str, place: Path | None = None, resumes: bool = True) -> Iterator[None]:
    """End in one line where the input is at fault, in a traceback where we are.

    With ``CPMM_TRACEBACK`` set in the environment, every error shows its traceback.

    Args:
        name: How the command calls itself.
        place: Where it works, for errors that name no file.
        resumes: Whether it goes on where it was interrupted if it is run again.
    """
    try:
        yield
    except KeyboardInterrupt:
        fail(name, "interrupted" + ("; run it again to go on" if resumes else ""), 130)
    except Exception as error:
        line = user_message(error, place)
        if line is None or os.environ.get("CPMM_TRACEBACK"):
            raise
        fail(name, f"error: {line}")


def fail(name: str, line: str, status: int = 1) -> NoReturn:
    """Print the last line of a command that failed, and exit."""
    print(f"{name}: {line}", file=sys.stderr, flush=True)
    raise SystemExit(status) from None


def user_message(error: Exception, place: Path | None = None) -> str | None:
    """Say in one line what is wrong with the input, the machine or what is installed.

    None for a bug of ours.
    """
    text = str(error).splitlines()[0] if str(error) else ""
    if lacks_memory(error):
        asked = re.search(r"tried to allocate (\d+) bytes", text)
        text = f"{int(asked[1]) / 2**20:,.0f} MiB more were asked for" if asked else text[:200]
        return (
            f"too little memory{text and f' ({text})'}: lower a batch_size, n_clusters, "
            "n_pseudotimes, n_draws or a field's width, set gradient=checkpoint or adjoint in the "
            "section solver of what is trained, or leave the process more memory"
        )
    if isinstance(error, EXPECTED_ERRORS) or system_error(error) is not None:
        return describe(error, place)
    if isinstance(error, ModuleNotFoundError):
        module = (error.name or "").partition(".")[0]
        extra = next((extra for extra, modules in EXTRAS.items() if module in modules), None)
        return extra and f"{module} is not installed: pip install 'cpmm[{extra}]'"
    if type(error).__name__ == "MisconfigurationException":  # Lightning's, imported where it trains
        remedy = "Set trainer.accelerator and trainer.devices to what this machine has."
        return f"{text[:200]} {remedy}"
    return None


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that there was too little memory."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def describe(error: BaseException, place: Path | None = None) -> str:
    """Say what went wrong in one line, and for want of space or rights, what to do.

    Args:
        error: What was raised.
        place: Where the work is done, for what names no file.
    """
    cause = system_error(error)
    if cause is None:
        return str(error) or type(error).__name__
    remedy = REMEDIES.get(cause.errno)
    named = cause.filename or (remedy and place)
    said = f"{cause.strerror}: {named}" if named else cause.strerror
    return f"{said}: {remedy}" if remedy else said


def reason_of(error: Exception) -> str | None:
    """Say why a model cannot be fitted to its data or scored on them, in one line.

    None where that is not what went wrong: for a bug of ours, the machine, or a damaged file.
    """
    from torch.linalg import LinAlgError

    if not isinstance(error, ValueError | FloatingPointError | LinAlgError):
        return None
    frames = traceback.walk_tb(error.__traceback__)
    if any(frame.f_globals.get("__name__", "").startswith(OF_FILES) for frame, _ in frames):
        return None
    return " ".join(str(error).split()) or type(error).__name__


def system_error(error: BaseException) -> OSError | None:
    """The system's error that ``error`` is, or wraps: safetensors only tells its number."""
    if isinstance(error, OSError):
        return error if error.strerror else None
    if isinstance(error, EXPECTED_ERRORS):
        return None
    if found := re.search(r"\(os error (\d+)\)", str(error)):
        return OSError(int(found[1]), os.strerror(int(found[1])))
    return None
