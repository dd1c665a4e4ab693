"""Layer-specific RoPE scaling: find, score and apply numbers of layers (positions) and of attention heads."""

from lrs_utils import tasks
from lrs_utils.export import export
from lrs_utils.finding.found import Found
from lrs_utils.finding.recipe import find_scaling
from lrs_utils.models.load import LM, load_lm
from lrs_utils.scaling.bezier import BezierCurve
from lrs_utils.scaling.extension import ExtendedScaling
from lrs_utils.scaling.files import load_factors, save_factors
from lrs_utils.scaling.heads import HeadScaling
from lrs_utils.scaling.layers import LayerScaling
from lrs_utils.scoring.ledger import Ledger
from lrs_utils.scoring.outcomes import Outcomes, score
from lrs_utils.searchers.descent import GradientSearch
from lrs_utils.searchers.engine import search
from lrs_utils.searchers.genetic import GeneticSearch, RandomSearch
from lrs_utils.searchers.refinement import RefinementSearch
from lrs_utils.searchers.rivals import CmaEsSearch, LinearSearch, TpeSearch

__version__ = "0.1.0"
__all__ = [
    "LM",
    "BezierCurve",
    "CmaEsSearch",
    "ExtendedScaling",
    "Found",
    "GeneticSearch",
    "GradientSearch",
    "HeadScaling",
    "LayerScaling",
    "Ledger",
    "LinearSearch",
    "Outcomes",
    "RandomSearch",
    "RefinementSearch",
    "TpeSearch",
    "export",
    "find_scaling",
    "load_factors",
    "load_lm",
    "save_factors",
    "score",
    "search",
    "tasks",
]
