"""What a command says when it fails: one line where the input is at fault."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

EXPECTED_ERRORS = (ValueError, FloatingPointError, OSError, MemoryError)


REMEDIES = {
    errno.ENOSPC: "make space there, and run it again",
    errno.EDQUOT: "make space there, and run it again",
    errno.EROFS: "make it writable, and run it again",
    errno.EACCES: "see to its permissions, and run it again",
    errno.EPERM: "see to its permissions, and run it again",
}


# In what torch says of it, a RuntimeError like any bug.
NO_MEMORY = ("allocate memory", "out of memory", "Storage size calculation overflowed")


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


def system_error(error: BaseException) -> OSError | None:
    """The operating system's error that ``error`` is, or wraps: safetensors only tells its number."""
    if isinstance(error, OSError):
        return error if error.strerror else None
    if isinstance(error, EXPECTED_ERRORS):
        return None
    if found := re.search(r"\(os error (\d+)\)", str(error)):
        return OSError(int(found[1]), os.strerror(int(found[1])))
    return None


def explain(error: Exception) -> str | None:
    """Say what to do about an error of a library that no check of ours can foresee; None for a bug."""
    text = str(error).splitlines()[0] if str(error) else ""
    if isinstance(error, RuntimeError) and any(words in text for words in NO_MEMORY):
        sizes = "n_clusters, n_pseudotimes, a field's width, a batch_size or n_draws"
        return f"too little memory ({text[:200]}): lower what the stage multiplies: {sizes}"
    if type(error).__name__ == "MisconfigurationException":  # Lightning's, imported where it trains
        return f"{text[:200]} Set trainer.accelerator and trainer.devices to what this machine has."
    return None
