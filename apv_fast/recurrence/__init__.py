"""The RSSM's recurrence beside the ops that run it: its phases, and what is hoisted out of it.

``phases`` is the contract with a backend, ``plain`` the recurrence in plain PyTorch that the fast ones are held to.
``hoisted`` has the large products before the recurrence and after it; ``observe``, ``stacked`` and ``imagination`` make
ops of a backend's recurrence.
"""
