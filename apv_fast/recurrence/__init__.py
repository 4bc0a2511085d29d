"""Filtering a whole sequence in one op: what does not depend on the recurrence is hoisted out of it.

``observe`` prepares the recurrence's inputs with large products, runs a *core* (the recurrence alone, forward or
backward, in whatever language) and turns what the core leaves into outputs and gradients with large products again.
``core`` is the contract, and the core in plain PyTorch that the fast ones are held to.
"""
