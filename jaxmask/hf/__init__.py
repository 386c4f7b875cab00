"""Transformers' own names and signatures over JAX, so that ported code changes one import."""
