"""Other people's methods without training, applied and scored like a scaling of layers."""

from lrs_utils.peers.buckets import AttentionBuckets
from lrs_utils.peers.lampe import LaMPE
from lrs_utils.peers.ms_poe import MsPoE
from lrs_utils.peers.regions import RegionScaling, ReRoPE, SelfExtend, String

__all__ = ["AttentionBuckets", "LaMPE", "MsPoE", "ReRoPE", "RegionScaling", "SelfExtend", "String"]
