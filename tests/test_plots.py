"""The pictures show the numbers that they were given, for degenerate input too."""

import os
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from pyro_vae.runs import plots

NAN = float("nan")
MINUS = "\N{MINUS SIGN}"


def record(epoch, **values):
    return {"epoch": epoch, "seconds": 2.0 * epoch, "elbo": -200 + 10 * np.log(epoch), **values}


def the_axes(figure) -> Any:
    return figure.axes[0]


def head(figure):
    return [text.get_text() for text in figure.texts]


def line(axes, label):
    (found,) = [line for line in axes.lines if line.get_label() == label]
    return found


def x_of(axes, label):
    return np.asarray(line(axes, label).get_xdata(), dtype=float)


def y_of(axes, label):
    return np.asarray(line(axes, label).get_ydata(), dtype=float)


def tick_labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def uniform(*shape):
    return np.random.default_rng(0).random(shape)


def test_bound_plots_the_records_against_epochs_and_time():
    records = [record(e, valid_elbo=-300.0 + e, rate=float(e), kl_weight=1.0) for e in (1, 2, 3)]
    figure = plots.bound(records)
    epochs, time, rate = figure.axes
    assert [axes.get_xlabel() for axes in figure.axes] == [
        "epoch",
        "training time (seconds)",
        "epoch",
    ]
    assert epochs.get_ylabel() == "ELBO (nats per datum)"
    assert "nats per datum" in rate.get_ylabel()
    for axes, x in ((epochs, [1, 2, 3]), (time, [2, 4, 6])):
        np.testing.assert_array_equal(x_of(axes, "training"), x)
        np.testing.assert_array_equal(y_of(axes, "training"), [r["elbo"] for r in records])
        np.testing.assert_array_equal(y_of(axes, "validation"), [-299, -298, -297])
    np.testing.assert_array_equal(y_of(rate, "rate"), [1, 2, 3])


def test_a_bound_of_averaged_parameters_is_called_so():
    records = [record(e, valid_elbo=-300.0 + e) for e in (1, 2)]
    epochs, time = plots.bound(records, averaged=True).axes
    for axes in (epochs, time):
        np.testing.assert_array_equal(
            y_of(axes, "validation of the averaged parameters"), [-299, -298]
        )


def test_bound_marks_the_best_validation_epoch_whatever_else_is_missing():
    valid = [NAN, -90.0, None, -80.25, -85.0]
    records = [record(e + 1, valid_elbo=v) for e, v in enumerate(valid)] + [record(6)]
    axes = plots.bound(records).axes
    assert len(axes) == 2
    np.testing.assert_array_equal(x_of(axes[0], "best validation"), [4])
    np.testing.assert_array_equal(x_of(axes[1], "best validation"), [8.0])
    # The gaps don't break the line.
    np.testing.assert_array_equal(x_of(axes[0], "validation"), [2, 4, 5])
    assert f"{MINUS}80.25" in head(plots.bound(records))[1]
    assert "epoch 4" in head(plots.bound(records))[1]


@pytest.mark.parametrize(("seconds", "label", "x"), [
    (100.0, "seconds", 100.0), (600.0, "minutes", 10.0), (9000.0, "hours", 2.5),
])  # fmt: skip
def test_bound_takes_the_unit_of_time_from_the_length(seconds, label, x):
    axes = plots.bound([{"epoch": 1, "seconds": seconds, "elbo": -1.0}]).axes[1]
    assert axes.get_xlabel() == f"training time ({label})"
    assert x_of(axes, "training") == [x]


def test_bound_is_not_squashed_by_the_first_epochs():
    epochs = np.arange(1, 201)
    figure = plots.bound([record(int(e), elbo=-100 - 1e5 * np.exp(-e)) for e in epochs])
    low, high = figure.axes[0].get_ylim()
    assert low > -110
    assert high > -100


@pytest.mark.parametrize("records", [
    [record(1)],
    [{"epoch": 1}],
    [record(1, elbo=None, valid_elbo=NAN)],
    [record(1, elbo=-float("inf"), valid_elbo=-3.0, rate=0.0)],
    [record(e, valid_elbo=-1.0, rate=3.0) for e in range(1, 2001)],
])  # fmt: skip
def test_bound_draws_degenerate_records(records, tmp_path):
    plots.save(plots.bound(records), tmp_path / "bound.png")


def test_bound_of_nothing_is_refused():
    with pytest.raises(ValueError, match="records"):
        plots.bound([])


def shown(figure):
    (image,) = figure.axes[0].images
    return np.asarray(image.get_array())


def test_reconstructions_show_every_value_on_the_scale_of_data_and_means():
    inputs, means = 16 * uniform(3, 12), 8 * uniform(3, 12) + 2
    draws = means.copy()
    draws[0, 0], draws[1, 1] = 1e6, -1e6
    figure = plots.reconstructions(inputs, means, draws, (4, 3))
    canvas_ = shown(figure)
    low, high = min(inputs.min(), means.min()), max(inputs.max(), means.max())
    for r, row in enumerate((inputs, means, draws)):
        for c, datum in enumerate(row):
            tile = canvas_[5 * r : 5 * r + 4, 4 * c : 4 * c + 3, 0]
            expected = np.clip((datum.reshape(4, 3) - low) / (high - low), 0, 1)
            np.testing.assert_allclose(tile, expected, atol=1e-12)
    assert tick_labels(figure.axes[0].yaxis) == ["input", "mean", "draw"]
    assert "3 data" in head(figure)[0]


def test_colour_images_come_channels_first():
    red = np.zeros((1, 3, 2, 2))
    red[:, 0] = 1.0
    np.testing.assert_array_equal(
        shown(plots.samples(red.reshape(1, 12), (3, 2, 2)))[0, 0], [1, 0, 0]
    )


@pytest.mark.parametrize(
    ("count", "rows", "columns"), [(64, 4, 16), (37, 5, 9), (1, 1, 1), (2, 1, 2)]
)
def test_samples_fill_a_grid(count, rows, columns):
    values = uniform(count, 4)
    canvas_ = shown(plots.samples(values, (2, 2)))
    assert canvas_.shape == (3 * rows - 1, 3 * columns - 1, 3)
    last = count - 1
    y, x = 3 * (last // columns), 3 * (last % columns)
    expected = (values[last].reshape(2, 2) - values.min()) / np.ptp(values)
    np.testing.assert_allclose(canvas_[y : y + 2, x : x + 2, 0], expected)


def test_a_constant_image_is_grey():
    assert (shown(plots.samples(np.full((1, 4), 7.0), (2, 2))) == 0.5).all()


def test_lines_keep_the_values_apart_and_in_order():
    values = np.array([[[0.0, 1.0, 0.5], [1.0, 1.0, 1.0]]])
    figure = plots.interpolations(values, None)
    (drawn,) = figure.axes[0].lines
    y = np.asarray(drawn.get_ydata(), float).reshape(2, 4)
    assert np.isnan(y[:, 3]).all()
    # Down is positive on this canvas.
    bottom, top = y[0, 0], y[0, 1]
    np.testing.assert_allclose((bottom - y[:, :3]) / (bottom - top), values[0])
    x = np.asarray(drawn.get_xdata(), float).reshape(2, 4)[:, :3]
    assert (np.diff(x.ravel()) > 0).all()


def test_traversals_label_rows_and_steps():
    figure = plots.traversals(uniform(2, 3, 4), (2, 2), ["z3", "z7"], [-2, 0, 2])
    assert tick_labels(figure.axes[0].yaxis) == ["z3", "z7"]
    assert tick_labels(figure.axes[0].xaxis) == [f"{MINUS}2.0", "0.0", "2.0"]
    with pytest.raises(ValueError, match="names: expected one for each of 2"):
        plots.traversals(uniform(2, 3, 4), (2, 2), ["z3"])
    with pytest.raises(ValueError, match="values: expected one a step, 3, got 2"):
        plots.traversals(uniform(2, 3, 4), (2, 2), ["z3", "z7"], [0, 1])


def test_manifold_has_z2_growing_upwards_and_no_gap():
    grid = np.arange(9.0).reshape(3, 3, 1)
    figure = plots.manifold(grid, (1, 1), [-1, 0, 1])
    np.testing.assert_allclose(shown(figure)[..., 0], grid[::-1, :, 0] / 8)
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("z1", "z2")
    assert tick_labels(axes.yaxis) == ["1.0", "0.0", f"{MINUS}1.0"]
    # The first row of the canvas is at the top.
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    with pytest.raises(ValueError, match="G, G, D"):
        plots.manifold(grid[:2], (1, 1))


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"image_shape: .* 4 values"):
        plots.samples(np.zeros((2, 4)), (3, 2))
    with pytest.raises(ValueError, match=r"means: .*2 dimensions"):
        plots.samples(np.zeros((0, 4)), (2, 2))
    with pytest.raises(ValueError, match="three equal shapes"):
        plots.reconstructions(np.zeros((2, 4)), np.zeros((1, 4)), np.zeros((2, 4)), (2, 2))
    with pytest.raises(ValueError, match="points"):
        plots.latents(np.zeros((5, 3)))
    with pytest.raises(ValueError, match="labels"):
        plots.latents(np.zeros((5, 2)), labels=[1, 2])


def coloured_points(figure, count):
    dots = figure.axes[0].collections[0]
    return np.asarray(dots.get_offsets()), dots.get_facecolors()[:count]


def test_latents_give_each_class_its_colour_and_name():
    points, labels = uniform(60, 2), np.repeat([3, 5, 8], 20)
    figure = plots.latents(points, labels)
    axes = the_axes(figure)
    legend = axes.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["3", "5", "8"]
    offsets, colours = coloured_points(figure, 60)
    handles = [handle.get_facecolor()[0] for handle in legend.legend_handles]
    for offset, colour in zip(offsets, colours, strict=True):
        (index,) = np.flatnonzero((points == offset).all(1))
        np.testing.assert_allclose(colour[:3], handles[[3, 5, 8].index(labels[index])][:3])
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("z1", "z2")
    # All are there, but not in the order of their class.
    np.testing.assert_array_equal(np.sort(offsets[:, 0]), np.sort(points[:, 0]))
    assert not np.array_equal(offsets, points)


def test_latents_without_labels_with_many_and_with_components():
    assert plots.latents([[0.0, 1.0]]).axes[0].get_legend() is None
    many = plots.latents(uniform(40, 2), uniform(40), explained=[0.374, 0.2])
    assert [axes.get_ylabel() for axes in many.axes] == [
        "second principal component (20 % of the variance)",
        "label",
    ]
    assert many.axes[0].get_xlabel() == "first principal component (37 % of the variance)"
    words = the_axes(plots.latents(uniform(2, 2), ["cat", "dog"])).get_legend()
    assert [text.get_text() for text in words.get_texts()] == ["cat", "dog"]


def test_evidence_counts_every_datum_and_names_both_errors():
    values = -100 - 5 * uniform(400)
    figure = plots.evidence(values, values.mean(), 0.0031, 0.23)
    axes = the_axes(figure)
    assert sum(bar.get_height() for bar in axes.patches) == 400
    assert axes.patches[0].get_x() == pytest.approx(values.min())
    np.testing.assert_allclose(x_of(axes, "mean"), values.mean())
    assert axes.get_xlabel() == "log p(x) (nats per datum)"
    title, errors = head(figure)
    assert title == "Histogram of log p(x) over 400 data"
    assert "0.0031 from the estimator" in errors.replace("\n", " ")
    assert "0.23 from the sampling of the test set" in errors.replace("\n", " ")


def test_evidence_of_one_datum_of_nothing_finite_and_as_a_score(tmp_path):
    one = plots.evidence([-3.0], -3.0, 0.1, NAN, name="score")
    assert one.axes[0].get_xlabel() == "score (nats per datum)"
    assert "log p" not in " ".join(head(one))
    assert "unknown from the sampling" in head(one)[1]
    plots.save(one, tmp_path / "one.png")
    lost = plots.evidence([-np.inf, NAN], -np.inf, NAN, NAN)
    assert "2 of them not finite" in head(lost)[1].replace("\n", " ")
    plots.save(lost, tmp_path / "lost.png")


def gallery(image_shape):
    data = uniform(4, 12)
    grid = data.reshape(2, 2, 12)
    yield plots.reconstructions(data, data, data, image_shape)
    yield plots.reconstructions(data[:1], data[:1], data[:1], image_shape)
    yield plots.samples(data, image_shape)
    yield plots.interpolations(grid, image_shape)
    yield plots.interpolations(grid[:, :1], image_shape)
    yield plots.traversals(grid, image_shape, ["z1", "z2"])
    yield plots.manifold(grid, image_shape, [-0.5, 0.5])
    yield plots.samples(np.full((1, 12), NAN), image_shape)


@pytest.mark.parametrize("image_shape", [None, (4, 3), (1, 3, 4), (3, 2, 2)])
def test_equal_data_give_equal_bytes_and_leave_nothing_behind(image_shape, tmp_path):
    for first, second in zip(gallery(image_shape), gallery(image_shape), strict=True):
        assert isinstance(first, Figure)
        a = plots.save(first, tmp_path / "a.png").read_bytes()
        b = plots.save(second, tmp_path / "b.png").read_bytes()
        assert a == b
        assert a.startswith(b"\x89PNG")
        assert b"matplotlib" not in a
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


@pytest.mark.parametrize("count", [1, 3, 40, 400])
def test_nothing_is_clipped(count):
    """All that is drawn lies within the figure, for few columns and for many."""
    steps = min(count, 15)
    names = [f"z{i} (12.3 nats)" for i in range(3)]
    for figure in (
        plots.samples(uniform(count, 4), (2, 2)),
        plots.traversals(uniform(3, steps, 4), (2, 2), names, np.linspace(-3, 3, steps)),
        plots.latents(uniform(count, 2), np.arange(count) % 10, [0.5, 0.25]),
        plots.evidence(-uniform(count), -0.5, 1.2e-3, 2.3e-2),
    ):
        figure.draw_without_rendering()
        drawn = figure.get_tightbbox()
        width, height = figure.get_size_inches()
        assert drawn.x0 >= 0
        assert drawn.y0 >= 0
        assert drawn.x1 <= width + 0.01
        assert drawn.y1 <= height + 0.01


def test_a_user_s_style_neither_leaks_in_nor_is_touched(tmp_path):
    points = uniform(5, 2)
    plain = plots.save(plots.latents(points), tmp_path / "plain.png").read_bytes()
    with matplotlib.rc_context({"font.size": 25, "axes.facecolor": "red", "savefig.dpi": 20}):
        styled = plots.save(plots.latents(points), tmp_path / "styled.png").read_bytes()
        assert matplotlib.rcParams["font.size"] == 25
    assert styled == plain


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        plots.save(plots.latents([[0.0, 1.0]]), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
