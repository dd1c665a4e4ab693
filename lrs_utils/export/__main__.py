"""python -m lrs_utils.export mine.json --model smollm2-135m --to folder"""

import argparse
import sys

import matplotlib.pyplot as plt

from lrs_utils.analysis.numbers import draw_numbers, list_maps
from lrs_utils.export.folder import export
from lrs_utils.export.forms import FORMS
from lrs_utils.export.gguf_file import export_gguf
from lrs_utils.models.load import load_lm
from lrs_utils.scaling.files import load_factors, read_factors, without_numbers


def main() -> None:
    """Read a factor file, load its model, and export it scaled."""
    parser = argparse.ArgumentParser(prog="python -m lrs_utils.export", description=__doc__)
    parser.add_argument("factors", help="a factor file, or the name of one that ships: smollm2-135m/general")
    parser.add_argument("--model", help="name, folder or hub id; by default what the factor file says")
    parser.add_argument("--to", required=True, help="a new folder, or a new .gguf file for llama.cpp")
    parser.add_argument("--form", default="auto", choices=("auto", *FORMS))
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16 or float16")
    given = parser.parse_args()
    try:
        content = read_factors(given.factors)
        model = given.model or content.get("model")
        if not model:
            raise ValueError(f"{given.factors} doesn't say its model; give --model")
        lm = load_lm(model, dtype=given.dtype)
        scaling = load_factors(given.factors, lm)
        if given.to.endswith(".gguf"):
            export_gguf(lm, scaling, given.to)
            print(given.to)
            return
        figure, axes = plt.subplots(1, n := max(1, len(list_maps(scaling, lm))), figsize=(4.3 * n, 3.2), squeeze=False)
        draw_numbers(scaling, lm, axes[0])
        print(export(lm, scaling, given.to, given.form, provenance=without_numbers(content), figure=figure))
    except (ValueError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
