"""Artifacts of another DVC repository, by revision."""

from __future__ import annotations

from pathlib import Path


def fetch_artifact(repository: str, revision: str | None, path: str, target: Path) -> None:
    """Fetch a folder or file of a DVC repository, at its newest revision if that is None.

    Raises:
        ValueError: If DVC is not installed, or the repository, revision or path cannot be had.
    """
    try:
        from dvc.exceptions import DvcException
        from dvc.repo import Repo
        from dvc.repo.open_repo import clean_repos
        from dvc.scm import SCMError
    except ModuleNotFoundError as error:
        if error.name != "dvc":
            raise
        raise ValueError("dvc+... needs DVC: pip install 'cpmm[workflow]'") from error

    try:
        Repo.get(repository, path, out=str(target), rev=revision)
    except (DvcException, SCMError, OSError) as error:
        causes = [str(error), str(error.__cause__ or "")]
        said = ": ".join(" ".join(text.split()) for text in causes if text)
        raise ValueError(
            f"{path} cannot be fetched from {repository} at revision {revision or 'HEAD'}: {said}; "
            "check the address, and that the repository's DVC remote is within reach (`dvc pull` "
            "there)"
        ) from error
    finally:
        clean_repos()  # forget clones that will not be there
