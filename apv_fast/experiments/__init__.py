"""The paper's transfer setups as plans of ordinary ``apv-fast`` commands, and what runs such a plan.

``setups.py`` says what an experiment consists of, ``sizes.py`` how much of everything, ``plan.py`` keeps the steps and
their states in ``plan.json``, ``runner.py`` runs them through a launcher: ``local.py`` or ``slurm.py``.
"""
