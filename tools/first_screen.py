"""What a notebook found, put where its reader begins: `python tools/first_screen.py notebook.ipynb ...`.

The first cell of a notebook has a place between `<!-- found -->` and `<!-- end -->`. It gets the output of the cell
tagged "answer" (sentences made from results) and a copy of the picture of the cell tagged "figure". So the first screen
says what this run found, whatever model it ran. The title states what the committed run found; where papermill was
given another model, the notebook's question takes its place.
"""

import re
import sys
from pathlib import Path
from typing import Any

import nbformat

_PLACE = re.compile(r"<!-- found -->\n.*?<!-- end -->", re.DOTALL)
_TITLE = re.compile(r"\A# [^\n]*\n\n(\[[^\n]*\n\n)?\*\*([^\n]*)\*\*\n\n")  # a badge of Colab, then the question, bold


def fill_first_screen(notebook: Any) -> None:
    """Fill the place in the first cell; nothing where it has none.

    Raises
    ------
    ValueError
        No cell, or no output, for the answer or the figure.
    """
    first = notebook.cells[0]
    if not _PLACE.search(first.source):
        return
    answer = _find_output(notebook, "answer", "text/markdown").data["text/markdown"]
    picture = _find_output(notebook, "figure", "image/png")
    alt = picture.metadata.get("image/png", {}).get("alt", "")
    screen = f"<!-- found -->\n{answer.strip()}\n\n![{alt}](attachment:figure.png)\n<!-- end -->"
    first.source = _PLACE.sub(lambda _: screen, first.source)
    if _models(notebook, "injected-parameters") - _models(notebook, "parameters"):
        first.source = _TITLE.sub(r"# \2\n\n\1", first.source)
    first["attachments"] = {"figure.png": {"image/png": picture.data["image/png"]}}


def _models(notebook: Any, tag: str) -> set[str]:
    cells = [cell.source for cell in notebook.cells if tag in cell.metadata.get("tags", [])]
    return {*re.findall(r"^\w*model\b.*?= (\S+)", "\n".join(cells), re.MULTILINE)}


def _find_output(notebook: Any, tag: str, kind: str) -> Any:
    for cell in notebook.cells:
        if tag in cell.metadata.get("tags", []):
            for output in cell.get("outputs", []):
                if kind in output.get("data", {}):
                    return output
    raise ValueError(f"the first cell has a place for what was found, but no cell tagged {tag!r} shows {kind}")


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        book = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
        fill_first_screen(book)
        nbformat.write(book, path)  # type: ignore[no-untyped-call]
