"""The cases: a module an op, of the op's name, and ``updates.py``; :func:`bench.registry.load` imports them all.

Each registers the op's sizes with its builder, for ``python -m bench`` and for ``python -m bench.device``. Ops that
belong together share a module: ``image_model`` is encoder and decoder, ``image_loss`` has ``normalize_image`` beside
it, ``kl_balance`` its Gaussian twin.
"""
