"""Lists of the same things in several files."""

import pytest
import yaml
from conftest import ROOT, read_committed

from cpmm.pipeline.scores.published import TITLES, published
from workflows import compare


def read(name):
    return yaml.safe_load((ROOT / name).read_text())


def test_every_baseline_is_in_conf_sweep_and_table():
    rows = {path.stem for path in (ROOT / "conf" / "baselines").glob("*.yaml")}
    grids = [part["grid"]["model"] for part in read("conf/sweep/table1.yaml")["parts"].values()]
    swept = sorted(model for models in grids for model in models)
    assert swept == sorted({"cpmm", *rows})
    for row in rows:  # under a heading that the table has
        assert read(f"conf/baselines/{row}.yaml")["block"] in compare.BLOCKS
    assert set(yaml.safe_load(read_committed("params.yaml"))["baselines"]) <= rows


@pytest.mark.parametrize("data", TITLES)
def test_table_3_has_every_model_that_tells_data_apart(data):
    told = {
        "cpmm",
        "refined",
        "direct",
        "matched",
        "gaussian",
        "teacher",
    }
    assert {f.model for f in published() if (f.table, f.data) == (3, data)} == told
