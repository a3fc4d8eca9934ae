import io
import re
from itertools import pairwise

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib import _pylab_helpers
from matplotlib.colors import to_hex, to_rgb

from cpmm import figures

IMAGE = (1, 6, 5)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def no_pyplot_state():
    yield
    assert not _pylab_helpers.Gcf.figs


def render(figure, kind="svg"):
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "cpmm"}):
        figure.savefig(file, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return file.getvalue()


def assert_nothing_is_cut_off(figure):
    figure.set_dpi(72)  # that of an SVG file
    figure.draw_without_rendering()
    box, size = figure.get_tightbbox(), figure.get_size_inches()
    assert min(box.x0, box.y0) >= 0
    assert box.x1 <= size[0]
    assert box.y1 <= size[1]


def texts(figure):
    found = [text.get_text() for axes in figure.axes for text in axes.texts]
    for axes in figure.axes:
        found += [axes.get_title(), axes.get_xlabel(), axes.get_ylabel()]
        found += [tick.get_text() for tick in (*axes.get_xticklabels(), *axes.get_yticklabels())]
    for legend in figure.legends:
        found += [text.get_text() for text in legend.get_texts()]
    return found


def history(n_spaces, n_tuning, per_space=2):
    epoch = np.arange(n_spaces * per_space + n_tuning)
    validation = np.linspace(1.4, -0.3, len(epoch))
    return pd.DataFrame(
        {
            "epoch": epoch,
            "step": 10 * (epoch + 1),
            "space": np.minimum(epoch // per_space, n_spaces).astype(float),
            "train": validation - 0.05,
            "validation": validation,
        }
    )


def every_figure(rng, n_features, image_shape, label):
    n, n_clusters, n_times = 60, 9, 5
    spaces = rng.normal(size=(4, n, n_features))
    data = spaces[-1]
    cluster = rng.integers(0, n_clusters, n)
    mean = rng.normal(size=(n_clusters, n_times, n_features))
    share = rng.uniform(size=mean.shape[:2])
    share[:, 0] = 0
    names = [f"cluster {c} = '$x$ <b>', 11 %" for c in range(n_clusters)]
    yield figures.plot_spaces(spaces, np.linspace(1, 0, 4), label, image_shape)
    yield figures.plot_samples(data, data + 1, label, cluster, image_shape)
    yield figures.plot_trajectory_means(mean, image_shape, names, share, data)
    yield figures.plot_trajectory_means(mean, image_shape)
    if n_features == 2:
        covariance = np.tile(np.diag([0.1, 0.3]), (20, 1, 1))
        points = rng.normal(size=(20, 2))
        yield figures.plot_components(points, covariance, np.repeat(np.arange(4), 5), data)


@pytest.mark.parametrize(
    ("n_features", "image_shape"),
    [(2, None), (7, None), (30, IMAGE), (90, (3, 6, 5)), (60, (2, 6, 5)), (120, (4, 6, 5))],
    ids=["plane", "table", "grey", "colour", "two channels", "four channels"],
)
@pytest.mark.parametrize("labelled", [True, False])
def test_every_kind_of_data_renders(rng, n_features, image_shape, labelled):
    label = rng.integers(-1, 9, 60) if labelled else None
    for figure in every_figure(rng, n_features, image_shape, label):
        assert_nothing_is_cut_off(figure)
        assert render(figure).startswith(b"<?xml")


def test_same_arrays_same_bytes(rng):
    data, cluster = rng.normal(size=(60, 7)), rng.integers(0, 9, 60)
    first, second = (
        render(figures.plot_samples(data, data + 1, cluster, cluster)) for _ in range(2)
    )
    assert first == second


def test_png(rng):
    figure = figures.plot_samples(
        rng.normal(size=(9, 2)), rng.normal(size=(9, 2)), None, np.zeros(9, int)
    )
    assert render(figure, "png").startswith(b"\x89PNG")


def test_spaces_of_images_are_rows_of_the_same_points_around_mid_grey(rng):
    spaces = rng.normal(size=(2, 20, 30)) * np.array([1.0, 100.0])[:, None, None]
    label = np.repeat([3, 1], 10)
    figure = figures.plot_spaces(spaces, np.array([1.0, 0.0]), label, IMAGE, n_images=4)
    (axes,) = figure.axes
    assert [t.get_text() for t in axes.get_yticklabels()] == ["v = 1 (latent)", "v = 0 (input)"]
    for space, strip in zip(spaces, axes.images, strict=True):
        shown = space[[10, 11, 0, 1]]  # two of class 1, then two of class 3
        reach = np.quantile(np.abs(shown), 0.995)
        tile = strip.get_array()[:, :5, 0]
        expected = np.clip(0.5 + shown[0].reshape(6, 5) / (2 * reach), 0, 1)
        np.testing.assert_allclose(tile, expected, atol=1e-6)


def test_spaces_of_a_table_use_the_principal_components_of_the_input(rng):
    spread = np.array([1.0, 30.0, 2.0, 10.0])
    data = rng.normal(size=(4000, 4)) * spread
    spaces = np.stack([rng.normal(size=data.shape), data])
    figure = figures.plot_spaces(spaces, np.array([1.0, 0.0]))
    latent, last = (np.ptp(axes.collections[0].get_offsets(), axis=0) for axes in figure.axes)
    assert last[0] > 2 * last[1] > 20  # features 1 and 3, in this order
    assert (latent < 12).all()  # the latent space is turned, not stretched
    share = spread[1] ** 2 / (spread**2).sum()
    shown = float(re.fullmatch(r"PC 1 \((\d+) %\)", figure.get_supxlabel())[1])
    assert abs(shown - 100 * share) < 2  # rounding, and 4000 points


def test_samples_share_limits_and_points_of_no_class_are_grey(rng):
    data, samples = rng.normal(size=(50, 2)), 3 * rng.normal(size=(80, 2))
    label = np.repeat([-1, 0], 25)
    figure = figures.plot_samples(data, samples, label, np.zeros(80, int))
    left, right = figure.axes
    assert left.get_xlim() == right.get_xlim()
    assert left.get_ylim() == right.get_ylim()
    colours = [to_hex(c.get_facecolor()[0]) for c in left.collections]
    assert colours == [figures.GREY, figures.PALETTE[0].lower()]


def test_many_clusters_are_told_apart_by_colour_and_marker():
    looks = {(figures._colour(c), figures._marker(c)) for c in range(-1, 30)}
    assert len(looks) == 31


def test_trajectories_of_images_fade_what_is_never_the_most_likely():
    mean = np.zeros((2, 3, 30))
    mean[..., ::2] = 1.0
    share = np.array([[0.0, 0.5, 0.1], [0.2, 0.2, 0.0]])
    figure = figures.plot_trajectory_means(mean, IMAGE, ["first", "second, $2$"], share)
    (axes,) = figure.axes
    assert [t.get_text() for t in axes.texts] == ["first", "second, $2$", "t = 0", "t = 1"]
    for row, strip in zip(share, axes.images, strict=True):
        darkest = [strip.get_array()[:, 6 * j : 6 * j + 5].min() for j in range(3)]
        np.testing.assert_allclose(darkest, np.where(row == 0, 0.75, 0.0), atol=1e-6)


@pytest.mark.parametrize(("n_features", "image_shape"), [(30, IMAGE), (7, None)])
@pytest.mark.parametrize("n_clusters", [1, 2, 12, 40])
def test_long_labels_fit(rng, n_features, image_shape, n_clusters):
    mean = rng.normal(size=(n_clusters, 3, n_features))
    names = [f"cluster {c} = '{'a rather long name ' * 5}', 3 %" for c in range(n_clusters)]
    figure = figures.plot_trajectory_means(mean, image_shape, names)
    assert_nothing_is_cut_off(figure)


def test_trajectories_are_thinned_with_both_ends_kept():
    mean = np.linspace(0, 1, 100)[None, :, None] * np.ones((1, 1, 30))
    figure = figures.plot_trajectory_means(mean, IMAGE, n_shown=10)
    strip = figure.axes[0].images[0].get_array()
    assert strip.shape[1] == 10 * 6 - 1
    assert strip[:, :5].max() < 0.01
    assert strip[:, -5:].min() > 0.99


def test_paths_leave_components_hollow_that_are_never_the_most_likely(rng):
    mean = rng.normal(size=(1, 4, 2))
    figure = figures.plot_trajectory_means(mean, share=np.array([[0, 1.0, 1, 1]]))
    points = figure.axes[0].collections[0]
    hollow = [to_hex(c) == "#ffffff" for c in points.get_facecolor()]
    assert hollow == [True, False, False, False]


def test_components_are_ellipses_of_the_covariance_that_darken_with_pseudotime():
    angle = np.pi / 6
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    covariance = np.tile(turn @ np.diag([0.25, 4.0]) @ turn.T, (3, 1, 1))
    mean = np.array([[0.0, 0], [1, 0], [2, 0]])
    figure = figures.plot_components(mean, covariance, np.zeros(3, int), mean, n_std=2)
    ellipses = figure.axes[0].collections[-1]
    # The eigenvector of 0.25 lies at 30 degrees, and half-axes are two standard deviations.
    np.testing.assert_allclose(ellipses.get_widths(), 2 * 2 * 0.5)
    np.testing.assert_allclose(ellipses.get_heights(), 2 * 2 * 2.0)
    np.testing.assert_allclose(np.asarray(ellipses.get_angles()) % 180, 30)
    light = [sum(to_rgb(c)) for c in ellipses.get_edgecolor()]
    assert light[0] > light[1] > light[2]
    low, high = figure.axes[0].get_ylim()
    assert low < -4 * np.cos(angle) < 4 * np.cos(angle) < high


def test_an_ellipse_too_thin_for_its_digits_is_a_line():
    covariance = np.array([[[1.0, 1.0], [1.0, 1.0 - 1e-15]]])
    assert np.linalg.eigvalsh(covariance).min() < 0
    mean = np.zeros((1, 2))
    figure = figures.plot_components(mean, covariance, np.zeros(1, int), mean)
    assert figure.axes[0].collections[-1].get_widths() == 0


def test_history_marks_fine_tuning_and_its_best_epoch():
    table = history(n_spaces=3, n_tuning=4)
    table.loc[1, "validation"] = -9.0  # better, in another space: may not be chosen
    table.loc[8, "validation"] = -1.0
    table.loc[7, "validation"] = np.nan
    figure = figures.plot_history(table, n_spaces=3)
    assert_nothing_is_cut_off(figure)
    assert "best -1.000 at step 90" in texts(figure)
    assert {"3 spaces: latent → input", "fine-tuning"} <= set(texts(figure))
    start = [line for line in figure.axes[0].lines if line.get_linestyle() == ":"]
    assert [line.get_xdata()[0] for line in start] == [60]


@pytest.mark.parametrize(("n_spaces", "n_tuning"), [(0, 5), (3, 0), (0, 1)])
def test_history_without_a_part_of_the_curriculum(n_spaces, n_tuning):
    found = texts(figures.plot_history(history(n_spaces, n_tuning), n_spaces))
    assert ("fine-tuning" in found) == (n_tuning > 0)
    assert any("best" in text for text in found) == (n_tuning > 0)


def test_confusion_orders_clusters_by_class():
    table = np.array([[0, 5, 1, 0], [3, 1, 0, 6]])
    figure = figures.plot_confusion(table, ["a", "<b> $"], np.array([-1, 0, -1, 1]))
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["1", "3", "0", "2"]
    expected = table[:, [1, 3, 0, 2]] / table.sum(1, keepdims=True)
    np.testing.assert_allclose(axes.images[0].get_array(), expected)
    assert [p.get_xy() for p in axes.patches] == [(-0.5, -0.5), (0.5, 0.5)]
    assert_nothing_is_cut_off(figure)


def test_confusion_with_an_empty_class_and_many_clusters():
    assert_nothing_is_cut_off(figures.plot_confusion(np.zeros((2, 40), int), ["a", "b"]))


def test_discretization_is_sorted_and_small_differences_stay_small():
    figure = figures.plot_discretization([100, 25], [2.0961, 2.0962], "bits per dimension")
    axes = figure.axes[0]
    assert axes.lines[0].get_xdata().tolist() == [25, 100]
    assert np.ptp(axes.get_ylim()) > 0.019
    assert axes.get_ylabel() == "bits per dimension"
    assert_nothing_is_cut_off(figure)


LABELS = ["no teacher n_factors=2 constant separate", "curriculum <b> $x$", "third"]


def sweep_figure(**panels):
    return figures.plot_sweep(LABELS, np.repeat([0, 1, 2], 3), panels, [0, 2, 3])


def test_a_sweep_shows_mean_deviation_and_every_trial():
    nan = np.nan
    density = np.array([2.1, 2.5, 2.3, 1.0, nan, nan, nan, nan, nan])
    figure = sweep_figure(density=density, accuracy=10 * density)
    left, right = figure.axes
    for axes, factor in ((left, 1), (right, 10)):
        first, second = axes.containers  # a row without a trial that finished has none
        (bar,) = first.lines[2]
        np.testing.assert_allclose(first.lines[0].get_xydata(), [[2.3 * factor, 0]])
        np.testing.assert_allclose(bar.get_segments()[0][:, 0], factor * np.array([2.1, 2.5]))
        np.testing.assert_allclose(second.lines[0].get_xydata(), [[factor, 1]])
        assert np.ptp(second.lines[2][0].get_segments()[0][:, 0]) == 0
        ticks = [line for line in axes.lines if to_hex(line.get_color()) == figures.GREY.lower()]
        points = np.concatenate([line.get_xdata() for line in ticks])
        np.testing.assert_allclose(points, factor * density[:4])
    shown = [tick.get_text() for tick in left.get_yticklabels()]
    assert [text.split("\n")[0] for text in shown] == LABELS
    assert [text.split("\n")[1:] for text in shown] == [
        [],
        ["(2 of 3 failed)"],
        ["(3 of 3 failed)"],
    ]
    bottom, top = left.get_ylim()
    assert bottom > top  # the first row is the highest
    assert (left.get_xlabel(), right.get_xlabel()) == ("density", "accuracy")


@pytest.mark.parametrize("n_panels", [1, 2])
@pytest.mark.parametrize("n_rows", [1, 9, 30])
def test_sweeps_of_any_size_render(rng, n_panels, n_rows):
    labels = [f"no teacher n_factors={i} constant shared" for i in range(n_rows)]
    row = np.repeat(np.arange(n_rows), 3)
    titles = ["test density, bits per dimension", "clustering accuracy, %"][:n_panels]
    panels = {title: rng.normal(size=3 * n_rows) for title in titles}
    panels[titles[0]][:3] = np.nan
    figure = figures.plot_sweep(labels, row, panels, [3, *[0] * (n_rows - 1)])
    assert_nothing_is_cut_off(figure)
    boxes = [axes.xaxis.label.get_window_extent() for axes in figure.axes]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
    assert render(figure).startswith(b"<?xml")
    assert any("3 of 3 failed" in text for text in texts(figure))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sweep_figure(density=np.zeros(8)), "density: expected 9 values, got 8"),
        (
            lambda: figures.plot_sweep(["a", "b"], np.zeros(1, int), {"d": np.zeros(1)}, [0]),
            "expected 2 counts of failures, got 1",
        ),
        (lambda: figures.plot_spaces(np.zeros((2, 3, 2)), [1.0]), r"\(V', N, M\)"),
        (lambda: figures.plot_spaces(np.zeros((1, 3, 2)), [1.0], np.zeros(2)), "label must be"),
        (
            lambda: figures.plot_spaces(np.zeros((1, 3, 8)), [1.0], None, IMAGE),
            "image_shape must be",
        ),
        (
            lambda: figures.plot_samples(np.zeros((2, 2)), np.zeros((2, 3)), None, np.zeros(2)),
            "data and samples",
        ),
        (lambda: figures.plot_trajectory_means(np.zeros((2, 3))), r"\(C, G, M\)"),
        (lambda: figures.plot_trajectory_means(np.zeros((2, 3, 2)), None, ["a"]), "as many labels"),
        (
            lambda: figures.plot_components(
                np.zeros((2, 3)), np.zeros((2, 3, 3)), np.zeros(2), np.zeros((5, 3))
            ),
            "in the plane",
        ),
        (lambda: figures.plot_history(pd.DataFrame({"step": [1]}), 1), "space, train, validation"),
        (lambda: figures.plot_confusion(np.zeros((2, 3)), ["a"]), "n_classes"),
        (lambda: figures.plot_discretization([25], [], "nats"), "one density for each G"),
    ],
)
def test_errors_say_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_points_of_one_feature_are_drawn_along_a_line():
    assert figures.plot_spaces(np.linspace(0, 1, 6).reshape(2, 3, 1), [1.0, 0.0]).axes
