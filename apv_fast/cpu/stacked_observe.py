"""``stacked_observe`` in C++: one scan after the other, with the link between the models as one product."""

from apv_fast.cpu.rssm_observe import scan
from apv_fast.recurrence.stacked import TwoScans, stacked_on

stacked_observe = stacked_on("cpu", TwoScans(scan))
