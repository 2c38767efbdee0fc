"""Text tables and plots."""

import pytest
from PIL import Image

from ddpo_jax.workdir import show


def test_a_table_aligns_its_columns():
    lines = [("name", "value"), ("a", "1"), ("longer", "23.5")]
    assert show.table(lines) == "name    value\na       1\nlonger  23.5"
    assert show.table(lines, numbers=True) == "  name  value\n     a      1\nlonger   23.5"
    with pytest.raises(ValueError):
        show.table([("a", "b"), ("c",)])


def test_panels_stand_in_rows(tmp_path):
    with show.plot(tmp_path / "p.png", panels=5, size=(2, 1), columns=3) as every:
        assert len(every) == 5
        every[0].plot([0, 1], [0, 1], label="a line")
    assert Image.open(tmp_path / "p.png").size == (720, 240)  # 3 by 2 of 2 by 1 inches at 120 dots
    assert every[0].get_legend() is not None and every[1].get_legend() is None


def test_a_plot_that_fails_leaves_no_file(tmp_path):
    with pytest.raises(ZeroDivisionError), show.plot(tmp_path / "p.png"):
        1 / 0  # noqa: B018
    assert not list(tmp_path.iterdir())
