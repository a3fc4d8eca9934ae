"""Lists of the same things in several files."""

import pytest
import yaml
from conftest import ROOT, read_committed

from cpmm.pipeline.config.fingerprints import EVALUATED
from cpmm.pipeline.scores.published import TITLES, published
from workflows import compare


def read(name):
    return yaml.safe_load((ROOT / name).read_text())


def test_every_baseline_is_in_conf_sweep_and_table():
    rows = {path.stem for path in (ROOT / "conf" / "baselines").glob("*.yaml")}
    grids = [part["grid"]["model"] for part in read("conf/sweep/table1.yaml")["parts"].values()]
    swept = sorted(model for models in grids for model in models)
    assert swept == sorted({"cpmm", *rows} - {"direct", "refined", "groups"})
    for row in rows:  # under a heading that the table has
        assert read(f"conf/baselines/{row}.yaml")["block"] in compare.BLOCKS
    compared = yaml.safe_load(read_committed("params.yaml"))["baselines"]
    assert set(compared) <= rows - set(EVALUATED)


def test_the_rows_that_evaluate_reads_are_trained_and_depended_on():
    stages = read("dvc.yaml")["stages"]
    assert set(stages["train_baseline"]["matrix"]["row"]) == set(EVALUATED)
    assert {dep for dep in stages["evaluate"]["deps"] if "/baselines/" in dep} == {
        f"data/${{item.preset}}/baselines/{row}" for row in EVALUATED
    }
    for stage in ("train_baseline", "train_compared_baseline"):
        assert "${item.row}" in stages[stage]["outs"][0]


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
