"""Layer-specific RoPE scaling: search, score and apply one position factor per decoder layer."""

from lrs_utils.supported import refuse_unsupported

refuse_unsupported()

from lrs_utils import tasks
from lrs_utils.bezier import BezierCurve
from lrs_utils.factors import load_factors, save_factors
from lrs_utils.finding import find_scaling
from lrs_utils.found import Found
from lrs_utils.heads import HeadScaling
from lrs_utils.ledger import Ledger
from lrs_utils.models import LM, load_lm
from lrs_utils.scaling import LayerScaling
from lrs_utils.scoring import Outcomes, score
from lrs_utils.search import (
    CmaEsSearch,
    GeneticSearch,
    GradientSearch,
    LinearSearch,
    RandomSearch,
    RefinementSearch,
    TpeSearch,
    search,
)

__version__ = "0.1.0"
__all__ = [
    "LM",
    "BezierCurve",
    "CmaEsSearch",
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
    "find_scaling",
    "load_factors",
    "load_lm",
    "save_factors",
    "score",
    "search",
    "tasks",
]
