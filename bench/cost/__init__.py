"""A model of what the ops must cost on a GPU: work between synchronisations, and the time that a machine needs for it.

:func:`bench.cost.ops.floor` gives the parts of an op at a size; ``python -m bench.roofline`` prints them. Pure Python.

Limits: a floor, not a prediction: work of one kind is taken to hide behind the slowest kind of its part, and latencies
other than a barrier's and a launch's are left out. It is the floor of one method: a scan whose blocks share what they
read (clusters with multicast) reads less from L2 than it says. Machines are data sheets until measured.
"""
