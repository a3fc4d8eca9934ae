import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from cpmm.artifact import file_digest, seal_folder
from cpmm.pipeline.config.compose import compose_preset
from cpmm.pipeline.config.fingerprints import fingerprint_evaluation
from workflows import report

HOSTILE = "<script>alert('&\"')</script>"
SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 4 3"><script>x</script></svg>'
CONFIG = compose_preset("digits", [])
SCORES = {"accuracy": 0.75, "nmi": 0.7, "ari": 0.6, "purity": 0.8}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "data" / "digits"
    (folder / "evaluation" / "figures").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    metrics = {
        "preset": "digits",
        "seed": 0,
        "unit": "bits per dimension",
        "n_test": 400,
        "models": {
            "cpmm": {
                "name": "CPMM, 10 x 25",
                "density": 2.10,
                "density_standard_error": 0.004,
                "n_components": 250,
                "n_parameters": 96000,
                **SCORES,
            },
            "direct": {
                "name": "Direct mixture",
                "density": 2.15,
                "density_standard_error": 0.004,
                "n_components": 250,
                "n_parameters": 96000,
                **SCORES,
            },
            "gaussian": {"name": "One Gaussian", "density": 2.01},
            "teacher": {"name": "Teacher", "density": 1.3},
            "kmeans": {"name": "k-means", "accuracy": 0.781},
        },
        "discretization": {"100": 2.09, "25": 2.10},
    }
    write(folder, metrics)
    (folder / "evaluation" / "rules.json").write_text(json.dumps({"density": "Test images."}))
    return folder


def write(folder, metrics):
    (folder / "metrics.json").write_text(json.dumps(metrics))


def change(folder, edit):
    metrics = json.loads((folder / "metrics.json").read_text())
    edit(metrics)
    write(folder, metrics)


def add_figures(folder):
    for picture in report.PICTURES:
        (folder / "evaluation" / "figures" / f"{picture.name}.svg").write_text(SVG)
    (folder / "evaluation" / "confusion.csv").write_text(f"class,0,1\n{HOSTILE},5,0\nb,1,7\n")


def seal(folder):
    """Seal the evaluation as evaluate does."""
    digest = file_digest(folder / "metrics.json")
    header = {"fingerprint": fingerprint_evaluation(CONFIG), "metrics": digest}
    seal_folder(folder / "evaluation", "evaluation", header, {})


def build(folder, **options):
    seal(folder)
    return report.write_report(folder, CONFIG | options).read_text(encoding="utf-8")


class Page(HTMLParser):
    """Collects tags with their attributes and the text between them."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in {"meta", "img", "link"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in {"style", "script"}:
            self.words.append(data)

    def attributes(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def test_page_loads_nothing(folder):
    add_figures(folder)
    html = build(folder)
    page = Page(html)
    assert not page.open  # every tag is closed
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "svg"})
    for _, attributes in page.tags:
        assert attributes.get("src", "data:").startswith("data:")
        assert attributes.get("href", "#").startswith("#")
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in html
    assert "@import" not in html
    assert "http://" not in html
    assert "https://" not in html
    assert len(page.attributes("img")) == len(report.PICTURES)


def test_contents_link_to_sections_in_the_order_of_the_page(folder):
    add_figures(folder)
    page = Page(build(folder))
    sections = [section["id"] for section in page.attributes("section")]
    assert [link["href"] for link in page.attributes("a")] == [f"#{name}" for name in sections]
    assert sections[1:-1] == [picture.name for picture in report.PICTURES]


def test_hostile_names_are_text(folder):
    add_figures(folder)

    def edit(metrics):
        metrics["preset"] = metrics["unit"] = HOSTILE
        metrics["models"]["cpmm"]["name"] = HOSTILE
        metrics["models"]["kmeans"]["density"] = HOSTILE

    change(folder, edit)
    (folder / "evaluation" / "rules.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    page = Page(build(folder, note=HOSTILE))
    assert not page.attributes("script")
    assert page.text.count(HOSTILE) >= 7


def test_same_inputs_same_bytes(folder):
    add_figures(folder)
    first = build(folder)
    assert build(folder) == first
    elsewhere = folder.parent / "moved"
    shutil.copytree(folder, elsewhere)
    assert build(elsewhere) == first
    assert not list(folder.glob("*.partial"))


def test_a_read_only_report_is_replaced(folder):
    build(folder)
    (folder / "report.html").chmod(0o444)
    assert HOSTILE in Page(build(folder, note=HOSTILE)).text


def test_first_screen_says_who_wins(folder):
    text = Page(build(folder)).text
    assert "2.100 bits per dimension, lower is better" in text
    assert (
        "Better than the direct mixture by 0.050. Worse than the single Gaussian by 0.090." in text
    )
    assert "75.0 %" in text
    assert "Worse than k-means by 3.1 points." in text
    assert "250 components, 96,000 parameters" in text


@pytest.mark.parametrize(
    ("own", "other", "verdict"),
    [
        ((2.10, 0.004), (2.11, 0.004), "Level with the rest, within two standard errors."),
        ((2.10, 0.003), (2.11, 0.003), "Better than the rest by 0.010."),
        ((-1.50, 0.003), (-1.70, 0.003), "Worse than the rest by 0.200."),
        ((2.10, None), (2.11, None), "Better than the rest by 0.010."),
        ((float("nan"), 0.003), (2.11, 0.003), "No comparison with the rest."),
    ],
)
def test_density_verdict(own, other, verdict):
    models = [
        {"density": d} | ({} if e is None else {"density_standard_error": e})
        for d, e in (own, other)
    ]
    assert report.compare_density(*models, "rest") == verdict


def test_missing_values_have_reasons(folder):
    def edit(metrics):
        metrics["models"]["gaussian"] |= {"n_parameters": float("nan"), "n_components": None}

    change(folder, edit)
    metrics = json.loads((folder / "metrics.json").read_text())
    table = report.tabulate(metrics["models"])
    cells = {
        row["name"]: dict(zip(table["headings"], row["cells"], strict=True))
        for row in table["rows"]
    }

    def note(model, heading):
        cell = cells[model][heading]
        assert cell["text"] == "–"
        return table["notes"][cell["note"] - 1]

    assert note("One Gaussian", "Parameters") == "not a finite number (nan)"
    assert note("One Gaussian", "Components") == "not measured for this model"
    assert note("One Gaussian", "NMI") == "no clusters to compare with the classes"
    assert note("k-means", "Density") == "the model gives no density"
    assert len(set(table["notes"])) == len(table["notes"])
    best = {name for name, row in cells.items() if row["Density"]["best"]}
    assert best == {"One Gaussian"}  # the teacher is no mixture
    assert cells["CPMM, 10 x 25"]["Density"]["text"] == "2.100 ± 0.004"


def test_without_labels_there_are_no_clustering_columns(folder):
    def edit(metrics):
        for model in metrics["models"].values():
            for key in SCORES:
                model.pop(key, None)

    change(folder, edit)
    page = Page(build(folder))
    assert "Not scored: no labels to compare with." in page.text
    assert "NMI" not in page.text


def test_only_cpmm_and_no_optional_file(folder):
    shutil.rmtree(folder / "evaluation" / "figures")
    models = {"cpmm": {"name": "CPMM", "density": -0.5}}
    change(folder, lambda m: m.update(models=models, unit="nats per dimension"))
    (folder / "evaluation" / "rules.json").write_text("{}")
    page = Page(build(folder))
    assert "−0.500 nats per dimension" in page.text
    assert "No comparison with the direct mixture." in page.text
    absent = ", ".join(picture.name for picture in report.PICTURES)
    assert f"not made: {absent}." in page.text
    assert not page.attributes("img")


def test_png_stands_in_for_svg(folder):
    figures = folder / "evaluation" / "figures"
    (figures / "spaces.png").write_bytes(b"\x89PNG")
    (figures / "samples.png").write_bytes(b"\x89PNG")
    (figures / "samples.svg").write_text(SVG)
    sources = [image["src"].split(";")[0] for image in Page(build(folder)).attributes("img")]
    assert sources == ["data:image/png", "data:image/svg+xml"]


def test_discretization_values_are_sorted_by_number(folder):
    add_figures(folder)
    assert re.search(r"25 2\.100 100 2\.090", Page(build(folder)).text)


@pytest.mark.parametrize("name", ["metrics.json", "evaluation/rules.json"])
@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"models": {"kmeans": {}}}'])
def test_what_is_missing_or_not_what_was_evaluated_is_named(folder, name, content):
    seal(folder)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises((FileNotFoundError, ValueError), match=rf"{name} is .*`dvc repro`"):
        report.write_report(folder, CONFIG)
    assert not (folder / "report.html").exists()


def test_command_reads_what_is_sealed_alone(folder):
    add_figures(folder)
    seal(folder)
    root = folder.parents[1]
    command = [sys.executable, Path(report.__file__), "data/digits/config.yaml"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "report: wrote data/digits/report.html"
    assert "n_clusters: 10" in Page((folder / "report.html").read_text(encoding="utf-8")).text
    change(folder, lambda metrics: metrics["models"]["cpmm"].update(density=1.0))
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(
        "report: error: data/digits/metrics.json is not what was evaluated"
    )
    assert "git checkout" in done.stderr
