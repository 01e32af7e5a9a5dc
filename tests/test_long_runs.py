"""Short forms of the programs that run for minutes (make fuzz, make crash, make soak).

Seconds each, everything in them once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")


@linux
def test_fuzzed_files_are_refused_or_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import random
    import re

    import fuzz_files

    judge, pool = fuzz_files.Judge(str(tmp_path)), fuzz_files.seeds()
    for content in pool:
        judge(content)
    assert judge.counts["models verified"] == len(pool) - 5, "the seeds themselves are good"
    rng = random.Random(0)
    for i in range(1500):
        judge(fuzz_files.mutate(rng.choice(pool), i))
    # Mutated files reach all that there is behind the first checks, or the fuzzer fuzzes nothing.
    for outcome in (
        "safetensors accepted",
        "safetensors refused",
        "JSON accepted",
        "JSON refused",
        "models loaded",
        "models refused",
        "checkpoints quantized",
    ):
        assert judge.counts[outcome] > 30, outcome
    assert re.search(fuzz_files.STRICTER, "x: the size is wrong") is None


def test_a_mutation_depends_on_its_number_alone() -> None:
    """Not on those before, which had changed what the fuzzer draws from, and at last made a list that holds itself."""
    import random

    import fuzz_files

    before = repr(fuzz_files.INTERESTING)
    for number in range(3000):
        fuzz_files.mutated(fuzz_files.parse('{"a": [1, {"b": 2}]}'), random.Random(number))
        assert repr(fuzz_files.INTERESTING) == before


def test_the_fuzzer_notices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another error than FormatError, a reader that accepts too much, and one that allocates what a header says."""
    import fuzz_files
    import numpy as np

    from qnative import files

    good = fuzz_files.joined(b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', b"1234")
    judge = fuzz_files.Judge(str(tmp_path))
    judge(good)
    with monkeypatch.context() as patched:
        patched.setattr(files, "_dimensions", lambda found, where: (*tuple(found)[::-1], 1))
        with pytest.raises(AssertionError, match="reads something else"):
            judge(good)
    with monkeypatch.context() as patched:
        patched.setattr(files.SafetensorsFile, "_judge", lambda self, names: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            judge(good)
    with monkeypatch.context() as patched:
        patched.setattr(
            files.SafetensorsFile, "_judge", lambda self, names: setattr(self, "kept", np.zeros(40 << 20, np.uint8))
        )
        judge.counts["files"] = fuzz_files.TRACED - 1
        with pytest.raises(AssertionError, match="bytes for a file of"):
            judge(good)
    with monkeypatch.context() as patched:
        patched.setattr(files.SafetensorsFile, "_judge", refuse)
        with pytest.raises(AssertionError, match="the reference library accepts what is refused"):
            judge(good)


def refuse(file: object, names: object) -> None:
    from qnative.storage import FormatError

    raise FormatError("fuzzed.safetensors: the moon is full")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_faults_while_saving() -> None:
    import crash_saving

    assert "limit on the size of files" in crash_saving.full_disk()
    crash_saving.read_only_folder()
    crash_saving.over_the_mapped_file()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_killed_while_saving() -> None:
    import crash_saving

    counts = crash_saving.kill(12)
    assert counts["kills"] == 12
    assert counts["temporary files left"] + counts["found new"] > 0, "no kill hit a save"


@linux
def test_soak() -> None:
    import soak

    found = soak.soak(4.0, 40)
    assert found["different results"] == 0 and found["calls"] > 40


@linux
def test_no_call_leaves_memory_behind() -> None:
    import soak

    found = soak.leaks(10)
    assert found["most bytes traced a call"] < 600, found
    assert found["most resident bytes grown"] < 8 << 20, found
