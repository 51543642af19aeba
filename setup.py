"""Builds and installs ``gr``; all that is known about it stands in pyproject.toml.

The operators are a package of their own (``kernels/``), because they are compiled against the torch that is
installed: ``make setup`` installs torch, then both, in that order, without build isolation.
"""

from setuptools import setup

setup()
