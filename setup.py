"""Builds and installs ``gr``; all that is known about it stands in pyproject.toml.

The operators are a package of their own (``kernels/``), because they are compiled against the torch that is
installed: ``make setup`` installs torch, then both, in that order, without build isolation.

``gr/configs`` is a link to ``configs``, so that the configs are package data like any other: a wheel holds copies.
"""

from setuptools import setup

setup()
