"""``stacked_observe`` in Triton."""

from __future__ import annotations

from apv_fast.scan.stacked import TwoScans, define_stacked

from .rssm_scan import TritonCore

stacked_observe = define_stacked("triton", TwoScans(TritonCore()))
