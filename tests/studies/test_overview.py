"""What is said over all panels of a sweep, against numbers worked out by hand."""

import contextlib
import json
import math

import numpy as np
import pytest
from PIL import Image

from ddpo_jax.studies import compare, overview
from ddpo_jax.studies.curves import Curve
from ddpo_jax.studies.overview import Panel


def curve(*values):
    queries = np.arange(len(values)) * 100.0
    return Curve(queries, queries / 10, np.asarray(values, float))


@pytest.fixture
def panels():
    """Gains: of a scale of 1, the baseline 1 and ours 2; of a scale of 10, the baseline 8 and 12, ours 15 and 25."""
    first = {"base": [curve(5, 5.5, 6)], "ours": [curve(5, 6, 7)]}
    second = {
        "base": [curve(0, 5, 8), curve(0, 5, 12)],
        "ours": [curve(0, 10, 15), curve(0, 10, 25)],
        "alone": [curve(0, 1)],
    }
    return [Panel("one", "base", first), Panel("ten", "base", second)]


def test_gains_are_in_units_of_the_baselines(panels):
    found = overview.overview(panels, difference=0.5)
    ours = found["methods"]["ours"]
    # 2 / 1, 15 / 10, 25 / 10: of three scores none is cut
    assert ours["normalised_gain"]["value"] == pytest.approx((2 + 1.5 + 2.5) / 3)
    low, high = ours["normalised_gain"]["interval"]
    assert low < 2 < high
    assert ours["probability"]["value"] == 1.0  # each of ours beats each of the baseline's, on both panels
    # "one": the baseline ends at 6 after 200, ours is there after 100; "ten": at 10 after 200, ours after 100
    assert [ours["speed_up"][title]["value"] for title in ("one", "ten")] == pytest.approx([2.0, 2.0])
    assert found["methods"]["base"]["normalised_gain"] == {"value": 1.0, "interval": None}
    assert "alone" not in found["methods"]  # it is on one panel only
    # deviation of 8 and 12 with n - 1: sqrt(8); to show 5: 2 ((1.960 + 0.842) sqrt(8) / 5)^2 = 5.02
    assert found["seeds_needed"] == {"ten": math.ceil(5.02)}
    text = overview.table(json.loads(json.dumps(found)))
    assert "ten: a difference of 0.5 of the baseline's gain needs 6 seeds" in text


def test_a_gain_is_in_the_same_units_as_in_a_comparison():
    """Of four seeds the least and the most are cut, on both sides: 6 / 2, where the means are 8 and 26."""
    base, ours = ([curve(0, value) for value in values] for values in ((1, 2, 2, 99), (-1, 5, 7, 21)))
    told = overview.overview([Panel("one", "base", {"base": base, "ours": ours})])["methods"]["ours"]
    groups = [compare.Group(name, {}, [], runs) for name, runs in (("base", base), ("ours", ours))]
    alone = compare.improvement(*groups)
    assert told["normalised_gain"] == alone["normalised_gain"] and alone["normalised_gain"]["value"] == 3.0


def test_a_panel_on_which_the_baseline_gains_nothing_is_left_out_and_named(panels):
    flat = Panel("flat", "base", {"base": [curve(3, 2)], "ours": [curve(3, 9)]})
    found = overview.overview([panels[0], flat])
    assert found["methods"]["ours"]["normalised_gain"]["value"] == 2.0 and found["left_out"] == ["flat"]
    assert "gains nothing there: flat" in overview.table(found)
    alone = overview.overview([flat])
    assert alone["methods"]["ours"]["normalised_gain"]["value"] is None


def test_where_the_baseline_falls_a_panel_is_drawn_in_the_rewards_unit(tmp_path, monkeypatch):
    drawn = []
    plot = overview.show.plot

    @contextlib.contextmanager
    def kept(*args):
        with plot(*args) as axes:
            yield axes
            drawn.extend((line.get_label(), line.get_ydata()[-1]) for line in axes[0].lines)

    monkeypatch.setattr(overview.show, "plot", kept)
    overview.plot(tmp_path / "o.png", [Panel("falls", "base", {"base": [curve(5, 4)], "ours": [curve(5, 7)]})])
    assert dict(drawn)["base"] == -1 and dict(drawn)["ours"] == 2


def test_curves_are_drawn_from_the_untrained_model_to_the_baselines_end(panels, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(overview.show, "plot", _noting(overview.show.plot, drawn))
    overview.plot(tmp_path / "overview.png", panels)
    first = {line.get_label(): line.get_ydata() for line in drawn[0].lines if len(line.get_xdata()) == 3}
    np.testing.assert_allclose(first["base"], [0, 0.5, 1])
    np.testing.assert_allclose(first["ours"], [0, 1, 2])
    assert Image.open(tmp_path / "overview.png").size == (1104, 408)


def _noting(plot, drawn):
    @contextlib.contextmanager
    def noted(*args):
        with plot(*args) as every:
            drawn.extend(every)
            yield every

    return noted
