"""Compiled decoding in tests: skipped where it cannot be had, and only there."""

import os
import shutil
import sys

import pytest


def need_compiler() -> None:
    """Skip where there is no C++ compiler. Where there is one, code that does not compile fails the test."""
    if sys.platform == "win32":
        pytest.skip("compiled decoding needs Linux or macOS")
    if "CXX" not in os.environ and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("there is no C++ compiler here")
