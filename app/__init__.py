"""Dialect: a self-hosted messenger server."""

__version__ = "1.0.0"
