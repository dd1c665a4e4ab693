"""Figures with words for readers who don't see them: in the SVG, and where a notebook shows it."""

import html
from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
from IPython.display import Image
from matplotlib.figure import Figure

from lrs_utils.models.download import write_whole


def write_svg(figure: Figure, path: Path, alt: str) -> None:
    """Write a figure; the first sentence of `alt` becomes the SVG's title, the rest its description."""
    with BytesIO() as drawn:
        figure.savefig(drawn, format="svg", metadata={"Date": None})
        before, tag, after = drawn.getvalue().decode().partition("<svg")
    attributes, end, content = after.partition(">")
    title, _, rest = alt.partition(". ")
    told = f"\n <title>{html.escape(title)}</title>\n <desc>{html.escape(rest or title)}</desc>"
    write_whole(path, f"{before}{tag}{attributes}{end}{told}{content}")


def as_image(figure: Figure, alt: str) -> Image:
    """A figure as the output of a notebook's cell; it is closed, or the cell would show it twice."""
    with BytesIO() as drawn:
        figure.savefig(drawn, format="png", metadata={"Software": None})
        plt.close(figure)
        return Image(drawn.getvalue(), alt=alt)  # type: ignore[no-untyped-call]
