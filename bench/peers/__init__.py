"""Other people's whole updates, timed as they are: ``python -m bench.peers NAME --path CHECKOUT``.

A driver (:mod:`bench.peers.contextwm`, :mod:`bench.peers.r2dreamer`, :mod:`bench.peers.torchrl`) builds the peer's own
learner at our sizes on random data that is on the device already, and says how it differs from ours. The checkout (or
the folder that a wheel was installed into) is the caller's, who names it; nothing is downloaded, and nothing in it is
changed. What a peer imports beside its own files must be installed or on ``PYTHONPATH``.

``python -m bench.device`` makes each of them a contestant whose checkout an environment variable names
(:data:`bench.peers.remote.VARIABLES`).

Limits: one update of one batch, again and again; no replay, no environment, and not a word about what it learns.
"""
