"""Suites: long contexts with questions of known depth.

A suite is data and nothing else: deterministic from its seed, and no model. What isn't generated is fetched once into
the cache, or read from your files. `scoring` asks it.
"""

from lrs_utils.tasks.chat import in_chat
from lrs_utils.tasks.copying import copying
from lrs_utils.tasks.factbook import capitals, country_pages
from lrs_utils.tasks.general import general_tasks, vary_size
from lrs_utils.tasks.kv import kv_gold_moved, kv_official, kv_retrieval
from lrs_utils.tasks.lines import lines_retrieval
from lrs_utils.tasks.long_text import continuations, long_texts
from lrs_utils.tasks.manual import references
from lrs_utils.tasks.mdqa import mdqa, mdqa_gold_moved
from lrs_utils.tasks.own import SHOP, from_jsonl
from lrs_utils.tasks.passkey import passkey
from lrs_utils.tasks.suite import Probe, Question, Suite, positions_at

__all__ = [
    "SHOP",
    "Probe",
    "Question",
    "Suite",
    "capitals",
    "continuations",
    "copying",
    "country_pages",
    "from_jsonl",
    "general_tasks",
    "in_chat",
    "kv_gold_moved",
    "kv_official",
    "kv_retrieval",
    "lines_retrieval",
    "long_texts",
    "mdqa",
    "mdqa_gold_moved",
    "passkey",
    "positions_at",
    "references",
    "vary_size",
]
