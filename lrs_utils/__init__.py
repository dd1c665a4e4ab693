"""Layer-specific RoPE scaling: search, score and apply one position factor per decoder layer."""

from lrs_utils.supported import refuse_unsupported

refuse_unsupported()

from lrs_utils import tasks
from lrs_utils.bezier import BezierCurve
from lrs_utils.ledger import Ledger
from lrs_utils.models import LM, load_lm
from lrs_utils.scaling import LayerScaling, load_factors, save_factors
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
    "GeneticSearch",
    "GradientSearch",
    "LayerScaling",
    "Ledger",
    "LinearSearch",
    "Outcomes",
    "RandomSearch",
    "RefinementSearch",
    "TpeSearch",
    "load_factors",
    "load_lm",
    "save_factors",
    "score",
    "search",
    "tasks",
]
