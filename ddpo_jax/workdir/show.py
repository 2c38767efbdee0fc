"""How results look, everywhere alike: text tables with aligned columns, and plots as PNG files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ddpo_jax.workdir import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def table(lines: Sequence[Sequence[str]], *, numbers: bool = False) -> str:
    """Rows of cells as text, every column as wide as its widest cell.

    Args:
      lines: rows of equally many cells; the first may be a heading.
      numbers: aligns cells on the right instead of the left.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    side = ">" if numbers else "<"
    rows = ("  ".join(f"{cell:{side}{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(row.rstrip() for row in rows)


@contextlib.contextmanager
def plot(
    path: str | os.PathLike[str], panels: int = 1, size: tuple[float, float] = (6.4, 4.0), columns: int | None = None
) -> Iterator[list[Axes]]:
    """Gives axes to draw on, side by side, and writes them to a PNG at the end, with a grid and, if named, a legend.

    Args:
      path: of the PNG; it appears whole or not at all.
      panels: number of axes.
      size: of one of them, in inches.
      columns: of panels in a row; all of them by default.
    """
    from matplotlib.figure import Figure  # here because it takes 0.5 s; Figure alone needs no display and no pyplot

    across = columns or panels
    down = -(-panels // across)
    figure = Figure(figsize=(size[0] * across, size[1] * down), layout="constrained")
    every = list(figure.subplots(down, across, squeeze=False).flat)
    for unused in every[panels:]:
        unused.set_visible(False)
    yield every[:panels]
    for axes in every[:panels]:
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    with files.replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
