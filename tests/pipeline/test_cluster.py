import os
import stat
from pathlib import Path

import pytest

from cpmm.pipeline.sweeps import cluster


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    for name in ("RAY_TMPDIR", "TMPDIR", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", ["RAY_TMPDIR", "TMPDIR"])
@pytest.mark.parametrize("folder", ["/tmp/" + 95 * "x", "/tmp/" + 14 * "\u6570", "/dev/null"])
def test_ray_gets_a_short_folder_of_its_own(monkeypatch, name, folder):
    monkeypatch.setenv(name, folder)
    own = Path(cluster._own_folder())
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    assert len(os.fsencode(own)) <= cluster.LONGEST
    own.rmdir()


def test_rays_own_choice_stands_where_it_works(monkeypatch):
    assert cluster._own_folder() is None
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/not/there/yet")
    assert cluster._own_folder() is None


def test_a_full_folder_is_not_taken(monkeypatch):
    monkeypatch.setattr(cluster, "ROOM_BYTES", 2**70)
    with pytest.raises(OSError, match="full or longer"):
        cluster._own_folder()


def test_no_place_for_sockets_says_what_to_set(monkeypatch):
    def refuse(**options):
        raise PermissionError

    monkeypatch.setenv("TMPDIR", "/tmp/" + 95 * "x")
    monkeypatch.setattr(cluster.tempfile, "mkdtemp", refuse)
    with pytest.raises(OSError, match="to a short folder"):
        cluster._own_folder()


@pytest.mark.parametrize(
    ("home", "given"), [("/dev/null", True), ("nowhere", True), ("", False), (None, False)]
)
def test_a_ray_of_our_own_has_a_token_where_home_cannot_keep_it(monkeypatch, tmp_path, home, given):
    for name in [*cluster.TOKEN, "RAY_ADDRESS"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", home or str(tmp_path))
    if home is None:
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    cluster.prepare_environment({"address": None})
    assert ("RAY_AUTH_TOKEN" in os.environ) is given
    monkeypatch.undo()
    os.environ.pop("RAY_AUTH_TOKEN", None)
