"""Holds the version of the package: `setuptools` reads it, and `build_info` reports it."""

__version__ = "0.1.0"
