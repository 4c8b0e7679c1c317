"""Pictures of benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kt_expert_server.errors import InvalidRequest


def pyplot() -> Any:
    """Raises InvalidRequest without matplotlib."""
    try:
        from matplotlib import pyplot as plt  # optional
    except ImportError as error:
        raise InvalidRequest("a plot needs matplotlib: pip install 'kt-expert[bench]'") from error
    return plt


@contextmanager
def figure_for(path: Path, size: tuple[float, float] = (7.0, 4.5)) -> Iterator[Any]:
    """Axes to draw on, which are then written with a legend and a grid (.png, .svg, .pdf). Raises as pyplot()."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    yield axis
    axis.grid(visible=True, which="both", alpha=0.3)
    axis.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
