"""What some tests need that not every machine has."""

from __future__ import annotations

import shutil

import pytest

needs_a_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler: apt-get install gcc libc6-dev")
needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="apt-get install strace")
