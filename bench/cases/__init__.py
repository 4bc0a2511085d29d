"""The cases, a module an op; :func:`bench.registry.select` imports them all."""
