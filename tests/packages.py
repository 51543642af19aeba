"""Packages that tests can't do without."""

from __future__ import annotations

import importlib.util
import os

import pytest


def needs(*packages: str) -> None:
    """Skip the module's tests where a package is missing; a failure under ``make test``, which installs them."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing and not os.environ.get("GR_TEST_ALL"):
        pytest.skip(
            f"{', '.join(missing)} not installed: make setup-sharded setup-ray setup-encoders",
            allow_module_level=True,
        )
    assert not missing, f"{', '.join(missing)} missing: make setup-sharded setup-ray setup-encoders"
