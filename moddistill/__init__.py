"""Distil large multimodal models into small sparse ones, in JAX."""

__version__ = "0.1.0"
