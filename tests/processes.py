"""Interpreters of their own for what a test may not do to the one that runs it: fork, exit, hang, be interrupted."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

#: Long past what any of them takes, on a machine with other things to do.
SECONDS_UNTIL_HUNG = 120


def python(code: str, *options: str, **environment: str) -> str:
    """Run code in an interpreter of its own; the test fails when that fails, or hangs. Returns what it prints."""
    done = subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(code)],
        capture_output=True, text=True, timeout=SECONDS_UNTIL_HUNG, env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 0, f"ended with {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout.strip()
