"""How much free text repeats itself by chance, and under a scaling at several doses: the limit of `find_scaling`.

    python tools/measure_free_text.py lrs_utils/data/factors/smollm2-135m/kv-short-40.json

Writes data/results/free_text.csv: a row for each scaling, dose and seed. Greedy text of different seeds
differs by rounding alone: it is decoded beside what is drawn.
"""

import argparse

import pandas as pd
from result_tables import write_table

from lrs_utils import LayerScaling, Ledger, load_factors, load_lm
from lrs_utils.finding.free_text import continue_freely, distinct_trigrams, near_repeats
from lrs_utils.models.download import cache_folder
from lrs_utils.scaling.base import Scaling


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("factors", nargs="*", help="factor files, or names of those that ship")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--seeds", type=int, default=5, help="of what is drawn")
    options = parser.parse_args()
    lm, ledger = load_lm(options.model, dtype="bfloat16"), Ledger(cache_folder() / "ledger.sqlite")
    scalings: list[tuple[str, float, Scaling]] = [("no scaling", 0.0, LayerScaling.identity(lm.num_layers))]
    scalings += [(name, dose, load_factors(name).at_dose(dose)) for name in options.factors for dose in (0.5, 1.0, 1.5)]
    rows = []
    for name, dose, scaling in scalings:
        for seed in range(options.seeds if name == "no scaling" else 1):
            tokens = continue_freely(lm, scaling, seed=seed, ledger=ledger)
            row = {"scaling": name, "dose": dose, "seed": seed}
            for measure, values in (
                ("near repeats", near_repeats(tokens)),
                ("trigrams seen before", 1 - distinct_trigrams(tokens)),
            ):
                row |= {f"{measure}, greedy": values[:, 0].mean(), f"{measure}, drawn": values[:, 1].mean()}
            rows.append(row)
            print(row, flush=True)
    write_table("free_text", pd.DataFrame(rows), f"measure_free_text.py {' '.join(options.factors)}", "%.4f")


if __name__ == "__main__":
    main()
