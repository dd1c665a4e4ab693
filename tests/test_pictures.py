from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from first_screen import fill_first_screen
from matplotlib import pyplot as plt
from nbconvert import HTMLExporter

from lrs_utils.analysis.methods import COLOURS, colour_of, compare, dot_panels, dots
from lrs_utils.analysis.pictures import as_image, write_svg
from lrs_utils.analysis.statistics import Interval


def test_a_method_has_one_colour_and_an_unknown_one_is_refused():
    assert colour_of("GA, pi, factors, U") == COLOURS["GA"] != colour_of("GA, no curve, pi, factors, nll")
    assert colour_of("gradient x 4, ntk, both, nll") == COLOURS["gradient x 4"]
    assert colour_of("best uniform (0.85)") == colour_of("one factor")
    with pytest.raises(ValueError, match="'Gradient' is no method with a colour"):
        colour_of("Gradient")


def test_methods_are_named_at_the_ends_of_their_lines_without_overlap():
    x = np.linspace(0, 1, 5)
    line = np.array([0.9, 0.2, 0.1, 0.2, 0.5])
    curves = {"no scaling": Interval(line, line - 0.1, line + 0.1), "GA": line + 0.001, "TPE": line - 0.3}
    figure = compare(curves, x, xlabel="depth", ylabel="accuracy", thin=["TPE"])
    texts = {text.get_text(): text.get_position()[1] for text in figure.axes[0].texts}
    assert texts.keys() == {"no scaling", "GA"}
    assert abs(texts["GA"] - texts["no scaling"]) > 0.03
    table = pd.DataFrame({"mean": [2, 1], "low": [1, 0], "high": [3, 2]}, index=["gradient", "GA"])
    axes = dots(table, xlabel="points").axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["gradient", "GA"]
    assert axes.get_yticks()[0] > axes.get_yticks()[1], "the first row is at the top"
    plt.close("all")


def test_panels_of_dots_name_each_method_once_and_leave_out_what_a_panel_lacks():
    table = pd.DataFrame({"mean": [2, 1], "low": [1, 0], "high": [3, 2]}, index=["gradient", "GA"])
    notes = table.iloc[:1].assign(note="3 of 4")
    figure = dot_panels({"pairs": table, "lines": notes, "text": table}, xlabel="points")
    left, right, below, unused = figure.axes
    assert [text.get_text() for text in left.get_yticklabels()] == ["gradient", "GA"]
    assert left.yaxis.get_tick_params()["labelleft"]
    assert not right.yaxis.get_tick_params()["labelleft"]
    assert [text.get_text() for text in right.texts] == ["3 of 4"]
    assert next(line.get_xdata()[0] for line in right.lines if line.get_marker() == "o") == 2
    assert below.get_title(loc="left") == "text"
    assert not unused.get_visible()
    assert figure.get_supxlabel() == "points"
    plt.close("all")


def test_a_figure_says_in_words_what_it_shows(tmp_path):
    figure, ax = plt.subplots()
    ax.plot([1, 2])
    write_svg(figure, tmp_path / "a.svg", "A < B. A is 1 and B is 2.")
    assert "<title>A &lt; B</title>\n <desc>A is 1 and B is 2.</desc>" in (tmp_path / "a.svg").read_text()
    again, ax = plt.subplots()
    ax.plot([1, 2])
    write_svg(again, tmp_path / "b.svg", "Only a title")
    assert "<title>Only a title</title>\n <desc>Only a title</desc>" in (tmp_path / "b.svg").read_text()
    image = as_image(figure, "A rises")
    assert image._repr_mimebundle_()[1]["image/png"]["alt"] == "A rises"
    assert not plt.fignum_exists(figure.number)


def test_the_first_screen_gets_what_the_notebook_found():
    def shown(tag, data, **metadata):
        output = nbformat.v4.new_output("display_data", data, metadata=metadata)
        return nbformat.v4.new_code_cell("x", outputs=[output], metadata={"tags": [tag]})

    picture = {"image/png": {"alt": "a U"}}
    first = nbformat.v4.new_markdown_cell("# Title\n\n<!-- found -->\nold\n<!-- end -->\n\nmore")
    cells = [first, shown("answer", {"text/markdown": "It is 3.\n"}), shown("figure", {"image/png": "AAAA"}, **picture)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    fill_first_screen(notebook)
    fill_first_screen(notebook)
    assert first.source == (
        "# Title\n\n<!-- found -->\nIt is 3.\n\n![a U](attachment:figure.png)\n<!-- end -->\n\nmore"
    )
    assert first.attachments == {"figure.png": {"image/png": "AAAA"}}
    with pytest.raises(ValueError, match="no cell tagged 'figure' shows image/png"):
        fill_first_screen(nbformat.v4.new_notebook(cells=cells[:2]))


@pytest.mark.parametrize(
    ("given", "title"),
    [
        ("seed = 1", "# It is so\n\n[badge](a)\n\n**Is it?**"),
        ('long_model = "a"', "# It is so\n\n[badge](a)\n\n**Is it?**"),
        ('long_model = "b"', "# Is it?\n\n[badge](a)"),
    ],
)
def test_a_title_claims_nothing_about_another_model(given, title):
    def cell(tag, source="x", **data):
        outputs = [nbformat.v4.new_output("display_data", data)] if data else []
        return nbformat.v4.new_code_cell(source, outputs=outputs, metadata={"tags": [tag]})

    place = "<!-- found -->\n<!-- end -->"
    first = nbformat.v4.new_markdown_cell(f"# It is so\n\n[badge](a)\n\n**Is it?**\n\nIt matters **now**.\n\n{place}")
    cells = [
        first,
        cell("parameters", 'profile: str = "cpu"  # whose\nlong_model: str = "a"  # "a" or a folder'),
        cell("injected-parameters", f"# Parameters\n{given}"),
        cell("answer", **{"text/markdown": "It is 3."}),
        cell("figure", **{"image/png": "AAAA"}),
    ]
    fill_first_screen(nbformat.v4.new_notebook(cells=cells))
    fill_first_screen(nbformat.v4.new_notebook(cells=cells))
    assert first.source.startswith(f"{title}\n\nIt matters **now**.\n\n<!-- found -->\nIt is 3.")


def test_a_page_has_the_words_of_its_pictures_and_leaves_out_hidden_cells():
    picture = nbformat.v4.new_output("display_data", {"image/png": "AAAA"}, metadata={"image/png": {"alt": 'a "U"'}})
    hidden = nbformat.v4.new_code_cell("secret = 1", outputs=[picture], metadata={"jupyter": {"source_hidden": True}})
    book = nbformat.v4.new_notebook(cells=[hidden, nbformat.v4.new_code_cell("shown = 2")])
    tools = Path(__file__).parent.parent / "tools"
    page, _ = HTMLExporter(template_name="page", extra_template_basedirs=[str(tools)]).from_notebook_node(book)
    assert """<img alt='a "U"'""" in page
    assert "secret" not in page
    assert "shown" in page
