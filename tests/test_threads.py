"""The thread pool, how many threads a call may use, and where that number comes from."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from processes import SECONDS_UNTIL_HUNG, python
from test_portable import compiler_here, links

import qnative as qn
from qnative import _core, cpus, threads

ROOT = Path(__file__).resolve().parents[1]
POSIX = pytest.mark.skipif(os.name != "posix", reason="there is no pool but on POSIX")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
FORK = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


@pytest.fixture(autouse=True)
def limit_left_alone() -> Iterator[None]:
    """Every test starts from the default, and has to end with what it started from."""
    qn.set_num_threads(None)
    yield
    assert len(threads._settings) == 1
    qn.set_num_threads(None)


# The pool itself, in C

PARTS = (
    "work", "company", "callers", "alone", "crowd", "manners", "refused", "limits", "worth", "forks",
    "forks-at-any-time", "leave-at-work",
)  # fmt: skip
SANITIZED = {
    "thread": ["-O1", "-g", "-fsanitize=thread"],
    "address": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}
#: The sanitizers want more address space than this part leaves them, and minutes for that one.
NOT_SANITIZED = {"refused", "forks-at-any-time"}
QUIET = {"TSAN_OPTIONS": "die_after_fork=0 atexit_sleep_ms=0", "ASAN_OPTIONS": "detect_leaks=0"}


def compile_pool(folder: Path, *flags: str) -> Path:
    program = folder / "pool"
    sources = [str(ROOT / "tests" / "pool.c"), str(ROOT / "csrc" / "qn_pool.c")]
    arguments = ["-std=gnu11", "-Wall", "-Wextra", "-pthread", *flags, f"-I{ROOT / 'csrc'}", *sources]
    done = subprocess.run([compiler_here(), *arguments, "-o", str(program), "-lm"], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return program


def run_part(program: Path, part: str) -> None:
    done = subprocess.run(
        [program, part], capture_output=True, text=True, timeout=SECONDS_UNTIL_HUNG, env=os.environ | QUIET
    )
    assert done.returncode == 0, f"{part} ended with {done.returncode}\n{done.stdout}{done.stderr}"
    assert done.stdout.splitlines() == ["ok"] and not done.stderr, done.stderr


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_pool(tmp_path_factory.mktemp("pool"), "-O2")


@pytest.fixture(scope="module", params=SANITIZED)
def sanitized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sanitized")
    flags = SANITIZED[str(request.param)]
    if not links(compiler_here(), folder, *flags):
        pytest.skip(f"the compiler cannot link or run {flags[2]} here")
    return compile_pool(folder, *flags)


@POSIX
@pytest.mark.parametrize("part", PARTS)
def test_pool(program: Path, part: str) -> None:
    run_part(program, part)


@POSIX
@pytest.mark.parametrize("part", [part for part in PARTS if part not in NOT_SANITIZED])
def test_sanitizers_find_nothing_in_the_pool(sanitized: Path, part: str) -> None:
    run_part(sanitized, part)


@POSIX
def test_every_part_is_run() -> None:
    source = (ROOT / "tests" / "pool.c").read_text(encoding="utf-8")
    assert all(f'{{"{part}", ' in source for part in PARTS)
    assert source.count('{"') == len(PARTS) + 1  # and "without", below


@POSIX
def test_a_program_without_the_pool(tmp_path: Path) -> None:
    """As it is compiled where there are no POSIX threads: every call runs on the thread that makes it."""
    compiler, compiled = compiler_here(), str(tmp_path / "qn_pool.o")
    flags = ["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-U__unix__", "-U__APPLE__"]
    flags += [f"-I{ROOT / 'csrc'}", "-c", str(ROOT / "csrc" / "qn_pool.c"), "-o", compiled]
    subprocess.run([compiler, *flags], check=True)
    arguments = ["-std=gnu11", "-pthread", f"-I{ROOT / 'csrc'}", str(ROOT / "tests" / "pool.c"), compiled, "-lm"]
    subprocess.run([compiler, *arguments, "-o", tmp_path / "pool"], check=True)
    run_part(tmp_path / "pool", "without")


# The pool in Python's process

(LIBRARY,) = Path(_core.__file__).parent.glob("qnative_threads*" + (".pyd" if os.name == "nt" else ".so"))
#: Calls the one pool with a task that is no Python and touches none: sleep for 20 ms.
NATIVE = f"""
import ctypes, os, sys, threading, time
library, libc = ctypes.CDLL({str(LIBRARY)!r}), ctypes.CDLL(None)
usleep = ctypes.cast(libc.usleep, ctypes.c_void_p)
def run(threads, us=20000):
    library.qn_pool_run(ctypes.c_int(threads), usleep, ctypes.c_void_p(us))
def pool_threads():
    names = []
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{{task}}/comm") as file:
            names.append(file.read().strip())
    return sorted(name for name in names if name.startswith("qnative-"))
def reap(child):
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, status
"""


def native(code: str) -> str:
    """`python`, beginning with NATIVE. Having threads when it forks, which Python warns of, is what this is about."""
    return python(NATIVE + code, "-Wignore::DeprecationWarning")


@LINUX
def test_threads_are_made_when_needed_and_stay() -> None:
    seen = native("""
import qnative as qn
print(pool_threads())
run(1)
print(pool_threads())
run(3)
print(pool_threads())
for n in (2, 5, 3, 4): run(n)
print(pool_threads())
""")
    assert seen.splitlines() == [
        "[]", "[]", "['qnative-1', 'qnative-2']", "['qnative-1', 'qnative-2', 'qnative-3', 'qnative-4']",
    ]  # fmt: skip


@LINUX
@pytest.mark.parametrize(
    ("m", "k", "n", "shared"), [(1, 64, 64, False), (1024, 1024, 64, True), (20000, 64, 1, True), (20000, 4, 1, True)]
)
def test_calls_that_take_long_are_shared(m: int, k: int, n: int, shared: bool) -> None:
    """Long because of their products, or because of their many rows; the first call, which nobody is awake for."""
    assert native(f"""
import numpy as np, qnative as qn
layer = qn.QuantizedLinear.from_float(np.ones(({n}, {k}), np.float32))
assert pool_threads() == []
qn.set_num_threads(2)
layer(np.ones(({m}, {k}), np.float32))
print(pool_threads())
""") == ("['qnative-1']" if shared else "[]")


@LINUX
def test_the_pool_of_the_other_modules_is_the_same_one() -> None:
    """What a module gets by cimport, a capsule, runs its task on threads that the library's own function has made."""
    seen = native("""
import qnative as qn
from qnative._core import qnative_threads
capsule = qnative_threads.__pyx_capi__["pool_run"]
api = ctypes.pythonapi
api.PyCapsule_GetName.restype, api.PyCapsule_GetName.argtypes = ctypes.c_char_p, [ctypes.py_object]
api.PyCapsule_GetPointer.restype = ctypes.c_void_p
api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
address = api.PyCapsule_GetPointer(capsule, api.PyCapsule_GetName(capsule))
Task = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int)
pool_run = ctypes.CFUNCTYPE(None, ctypes.c_int, Task, ctypes.c_void_p)(address)
run(3)
took_part, both = {}, threading.Barrier(3, timeout=60)
def task(context, thread):
    took_part[thread] = threading.get_native_id()
    both.wait()
pool_run(3, Task(task), None)
assert sorted(took_part) == [0, 1, 2] and took_part[0] == threading.get_native_id()
assert len(set(took_part.values())) == 3
print(pool_threads())
""")
    assert seen == "['qnative-1', 'qnative-2']"


@LINUX
def test_unloading_the_library_leaves_its_threads_alone() -> None:
    """The threads sleep in the library's code: it has to stay although nobody wants it any more."""
    seen = native("""
import _ctypes
run(3)
_ctypes.dlclose(library._handle)
time.sleep(0.05)
with open("/proc/self/maps") as file:
    assert any("qnative_threads" in line for line in file)
print(pool_threads())
""")
    assert seen == "['qnative-1', 'qnative-2']"


@POSIX
@pytest.mark.parametrize("leave", ["", "sys.exit(0)", "os._exit(0)", "raise SystemExit"])
def test_the_interpreter_ends_while_the_pool_is_at_work(leave: str) -> None:
    native(f"""
def work():
    while True: run(4, 300)
threading.Thread(target=work, daemon=True).start()
import qnative as qn
qn.set_num_threads(4)
time.sleep(0.05)
{leave}
""")


@FORK
@pytest.mark.parametrize("before", ["pass", "run(4)", "busy()"], ids=["before use", "after use", "during a call"])
def test_fork(before: str) -> None:
    native(f"""
import numpy as np, qnative as qn
qn.set_num_threads(4)
layer = qn.QuantizedLinear.from_float(np.eye(64, 256, dtype=np.float32))
x = np.linspace(-1, 1, 64 * 256, dtype=np.float32).reshape(64, 256)
expected = layer(x)
threads = []
def busy():
    stays = threading.Thread(target=run, args=(4, 1_000_000))
    stays.start()
    threads.append(stays)
    while not pool_threads(): time.sleep(0.001)
{before}
children = []
for _ in range(3):
    child = os.fork()
    if child == 0:
        run(4)
        assert len(pool_threads()) == 3
        assert layer(x).tobytes() == expected.tobytes()
        os._exit(0)
    children.append(child)
run(4)
assert layer(x).tobytes() == expected.tobytes()
for child in children: reap(child)
for thread in threads: thread.join()
run(4)
assert len(pool_threads()) == 3
""")


@FORK
def test_a_child_finds_its_own_default_and_forgets_others_blocks() -> None:
    native("""
import qnative as qn
from qnative import cpus, threads
cpus.available = lambda root="/": 7
assert qn.get_num_threads() == 7
cpus.available = lambda root="/": 3
assert qn.get_num_threads() == 7  # found once

def child_sees(n):
    child = os.fork()
    if child == 0:
        found = qn.get_num_threads()
        qn.set_num_threads(11)  # does not wait for a lock that nobody will give back
        os._exit(0 if (found, qn.get_num_threads()) == (n, 11) else 1)
    reap(child)

child_sees(3)  # of its own CPUs
with qn.num_threads(5):
    child_sees(5)
    child_sees(5)
qn.set_num_threads(6)
child_sees(6)
entered, leave = threading.Event(), threading.Event()
def stay():
    with qn.num_threads(2):
        with threads._lock:
            entered.set()
            leave.wait()
other = threading.Thread(target=stay)
other.start()
entered.wait()
assert qn.get_num_threads() == 2
child_sees(6)
leave.set()
other.join()
assert qn.get_num_threads() == 6
""")


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(method: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import multiprocessing, sys
        import numpy as np, qnative as qn
        layer = qn.QuantizedLinear.from_float(np.eye(64, 256, dtype=np.float32))
        x = np.linspace(-1, 1, 64 * 256, dtype=np.float32).reshape(64, 256)

        def use(n):
            with qn.num_threads(n):
                return layer(x).tobytes()

        if __name__ == "__main__":
            expected = use(4)
            with multiprocessing.get_context(sys.argv[1]).Pool(2) as pool:
                assert pool.map_async(use, [1, 2, 3, 4]).get(60) == [expected] * 4
    """)
    )
    import multiprocessing

    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    done = subprocess.run(
        [sys.executable, "-Wignore::DeprecationWarning", script, method],
        capture_output=True, text=True, timeout=SECONDS_UNTIL_HUNG, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_many_threads_call_while_the_limit_changes() -> None:
    rng = np.random.default_rng(0)
    layer = qn.QuantizedLinear.from_float(rng.standard_normal((256, 512)).astype(np.float32))
    x = rng.standard_normal((96, 512)).astype(np.float32)
    with qn.num_threads(1):
        expected = layer(x).tobytes()
    done = threading.Event()

    def change() -> None:
        n = 0
        while not done.is_set():
            n = n % 6 + 1
            qn.set_num_threads(n)

    def call(_: int) -> bool:
        return all(layer(x).tobytes() == expected for _ in range(10))

    changer = threading.Thread(target=change)
    changer.start()
    try:
        with ThreadPoolExecutor(40) as executor:
            assert all(executor.map(call, range(40), timeout=SECONDS_UNTIL_HUNG))
    finally:
        done.set()
        changer.join()


# The number of threads


def test_default_is_what_the_process_can_use() -> None:
    assert qn.get_num_threads() == min(cpus.available(), _core.MAX_THREADS)
    if hasattr(os, "sched_getaffinity"):
        assert 1 <= qn.get_num_threads() <= len(os.sched_getaffinity(os.getpid()))


@pytest.mark.parametrize("n", [1, 2, 7, _core.MAX_THREADS, np.int64(3), np.uint8(4)])
def test_set(n: int) -> None:
    default = qn.get_num_threads()
    qn.set_num_threads(n)
    assert qn.get_num_threads() == n and type(qn.get_num_threads()) is int
    qn.set_num_threads(None)
    assert qn.get_num_threads() == default


@pytest.mark.parametrize("function", [qn.set_num_threads, qn.num_threads], ids=["set", "block"])
@pytest.mark.parametrize("n", [0, -1, _core.MAX_THREADS + 1, 2**31, 2**32 + 1, -(2**63), 2**100])
def test_numbers_that_are_none(function: Callable[[int], object], n: int) -> None:
    qn.set_num_threads(3)
    with pytest.raises(ValueError, match=rf"n = {n} must be from 1 to 1024"):
        function(n)
    assert qn.get_num_threads() == 3


@pytest.mark.parametrize("function", [qn.set_num_threads, qn.num_threads], ids=["set", "block"])
@pytest.mark.parametrize("n", [1.0, "2", True, [], np.float32(1)])
def test_types_that_are_no_number(function: Callable[[object], object], n: object) -> None:
    with pytest.raises(TypeError, match=rf"n must be an integer.*not {type(n).__name__}"):
        function(n)


def test_the_gate_checks_too() -> None:
    for n in (0, -1, _core.MAX_THREADS + 1, 2**40):
        with pytest.raises(ValueError, match=r"must be in 1 \.\. 1024"):
            _core.set_num_threads(n)
    with pytest.raises(TypeError):
        _core.set_default_threads(None)  # type: ignore[arg-type]


def test_blocks_nest_and_restore() -> None:
    qn.set_num_threads(5)
    with qn.num_threads(2):
        assert qn.get_num_threads() == 2
        with qn.num_threads(3):
            qn.set_num_threads(4)
            assert qn.get_num_threads() == 4
        assert qn.get_num_threads() == 2
        with pytest.raises(KeyError), qn.num_threads(7):
            raise KeyError
        assert qn.get_num_threads() == 2
        with qn.num_threads(None):
            assert qn.get_num_threads() == cpus.available()
    assert qn.get_num_threads() == 5


def test_a_block_as_a_decorator_and_a_block_made_but_never_entered() -> None:
    @qn.num_threads(3)
    def limited() -> int:
        return qn.get_num_threads()

    qn.set_num_threads(2)
    assert [limited(), qn.get_num_threads(), limited(), qn.get_num_threads()] == [3, 2, 3, 2]


def test_blocks_of_several_threads_overlap() -> None:
    """Left in the order in which they were entered: nobody restores what another block had set."""
    qn.set_num_threads(9)
    first, second = qn.num_threads(2), qn.num_threads(3)

    def elsewhere(function: Callable[[], object]) -> None:
        thread = threading.Thread(target=function)
        thread.start()
        thread.join()

    elsewhere(first.__enter__)
    elsewhere(second.__enter__)
    assert qn.get_num_threads() == 3
    elsewhere(lambda: first.__exit__(None, None, None))
    assert qn.get_num_threads() == 3
    elsewhere(lambda: second.__exit__(None, None, None))
    assert qn.get_num_threads() == 9


def test_blocks_in_many_threads_leave_nothing() -> None:
    qn.set_num_threads(8)

    def use(seed: int) -> None:
        for i in range(200):
            with qn.num_threads(1 + (seed + i) % 7):
                assert 1 <= qn.get_num_threads() <= 7

    with ThreadPoolExecutor(8) as executor:
        list(executor.map(use, range(8), timeout=SECONDS_UNTIL_HUNG))
    assert qn.get_num_threads() == 8


def test_an_interrupt_while_the_default_is_looked_for_is_not_lost() -> None:
    assert native("""
import numpy as np, qnative as qn
from qnative import cpus
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # who starts us in the background has it ignored
def interrupted(root="/"):
    raise KeyboardInterrupt
cpus.available, found = interrupted, cpus.available
try:
    qn.QuantizedLinear.from_float(np.ones((4, 4), np.float32))
    time.sleep(5)
except KeyboardInterrupt:
    print("heard")
cpus.available = found
print(qn.get_num_threads() == found())
""").split() == ["heard", "True"]


# QNATIVE_NUM_THREADS

SHOW = "import qnative as qn; print(qn.get_num_threads())"


@pytest.mark.parametrize(("text", "n"), [("1", 1), (" 1 ", 1), ("", None), ("  ", None), ("0001", 1), ("1024", None)])
def test_environment_lowers_the_default(text: str, n: int | None) -> None:
    assert int(python(SHOW, QNATIVE_NUM_THREADS=text)) == (n or cpus.available())


def test_environment_is_a_limit_of_the_default_only() -> None:
    code = """
    import qnative as qn
    from qnative import cpus
    cpus.available = lambda root="/": 8
    print(qn.get_num_threads())
    qn.set_num_threads(6)
    print(qn.get_num_threads())
    """
    assert python(code, QNATIVE_NUM_THREADS="4").split() == ["4", "6"]
    assert python(code, QNATIVE_NUM_THREADS="12").split() == ["8", "6"]


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "two", "1025", "9" * 5000, "\u0661", "1_0", "+2", "0x2", "1,2"])
def test_environment_that_means_nothing(text: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SHOW], capture_output=True, text=True, timeout=SECONDS_UNTIL_HUNG,
        env=os.environ | {"QNATIVE_NUM_THREADS": text, "PYTHONUTF8": "1"}, encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 1 and done.stdout == ""
    message = done.stderr.splitlines()[-1]
    assert message.startswith(f"ValueError: QNATIVE_NUM_THREADS={text}: must be an integer from 1 to 1024. Unset it")


def test_importing_reads_no_control_group() -> None:
    assert python("""
        import sys, numpy
        before = set(sys.modules)
        import qnative
        print({"qnative.cpus", "threading"} & (set(sys.modules) - before))
        qnative.get_num_threads()
        print("qnative.cpus" in sys.modules)
    """).splitlines() == ["set()", "True"]


# CPUs

V2 = "30 20 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "33 32 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:10 - cgroup cgroup rw,cpu,cpuacct\n"
V1_SET = "34 32 0:30 / /sys/fs/cgroup/cpuset rw,nosuid shared:11 - cgroup cgroup rw,cpuset\n"
OTHERS = "20 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n25 20 0:5 / /proc rw - proc proc rw\n"


def v2(**limits: str) -> dict[str, str]:
    """A unified hierarchy with the process in /kube/pod; limits of the root, of kube and of pod."""
    places = {"root": "", "kube": "kube/", "pod": "kube/pod/"}
    files = {f"sys/fs/cgroup/{places[name]}cpu.max": text for name, text in limits.items()}
    return {"proc/self/cgroup": "0::/kube/pod\n", "proc/self/mountinfo": OTHERS + V2, **files}


def v1(quota: str | None, period: str | None = "100000", place: str = "kube/pod/", **other: str) -> dict[str, str]:
    folder = f"sys/fs/cgroup/cpu,cpuacct/{place}cpu.cfs_"
    files = {f"{folder}{name}_us": text for name, text in (("quota", quota), ("period", period)) if text is not None}
    groups = "4:cpu,cpuacct:/kube/pod\n3:cpuset:/\n1:name=systemd:/kube/pod\n0::/kube/pod\n"
    mounts = OTHERS + V1_SET + V1
    return {"proc/self/cgroup": groups, "proc/self/mountinfo": mounts, **files, **other}


TREES: dict[str, tuple[dict[str, str], float | None]] = {
    "nothing": ({}, None),
    "v2: own group": (v2(pod="150000 100000\n"), 1.5),
    "v2: no limit": (v2(root="max 100000\n", kube="max 100000\n", pod="max 100000\n"), None),
    "v2: no files": (v2(), None),
    "v2: the parent's is smaller": (v2(kube="200000 100000\n", pod="400000 100000\n"), 2.0),
    "v2: the parent's is larger": (v2(kube="800000 100000\n", pod="400000 100000\n"), 4.0),
    "v2: only the root's": (v2(root="300000 100000\n", pod="max 100000\n"), 3.0),
    "v2: other period": (v2(pod="25000 10000\n"), 2.5),
    "v2: less than one": (v2(pod="50000 100000\n"), 0.5),
    "v2: without a period": (v2(pod="250000\n"), 2.5),
    "v2: without a newline": (v2(pod="250000 100000"), 2.5),
    "v2: nonsense": (v2(kube="200000 100000\n", pod="lots 100000\n"), 2.0),
    "v2: empty": (v2(pod=""), None),
    "v2: zero period": (v2(pod="100000 0\n"), None),
    "v2: zero quota": (v2(pod="0 100000\n"), None),
    "v2: negative": (v2(pod="-1 100000\n"), None),
    "v2: too many digits": (v2(pod="9" * 400 + " 100000\n"), None),
    "v2: in a namespace": (
        {"proc/self/cgroup": "0::/\n", "proc/self/mountinfo": OTHERS + V2, "sys/fs/cgroup/cpu.max": "150000 100000\n"},
        1.5,
    ),
    "v2: a group outside the namespace": (
        {
            "proc/self/cgroup": "0::/../../elsewhere\n", "proc/self/mountinfo": OTHERS + V2,
            "sys/fs/cgroup/cpu.max": "350000 100000\n", "sys/elsewhere/cpu.max": "100000 100000\n",
        },
        3.5,
    ),
    "v2: a part is mounted": (
        {
            "proc/self/cgroup": "0::/kube/pod/inner\n",
            "proc/self/mountinfo": "30 20 0:26 /kube/pod /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
            "sys/fs/cgroup/inner/cpu.max": "max 100000\n", "sys/fs/cgroup/cpu.max": "600000 100000\n",
        },
        6.0,
    ),
    "v2: another part is mounted": (
        {
            "proc/self/cgroup": "0::/kube/pod2\n",
            "proc/self/mountinfo": "30 20 0:26 /kube/pod /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
            "sys/fs/cgroup/cpu.max": "600000 100000\n", "sys/fs/cgroup/2/cpu.max": "100000 100000\n",
        },
        6.0,
    ),
    "v2: a place with spaces": (
        {
            "proc/self/cgroup": "0::/a b\n",
            "proc/self/mountinfo": "30 20 0:26 / /my\\040cgroup\\134s rw - cgroup2 cgroup2 rw\n",
            "my cgroup\\s/a b/cpu.max": "200000 100000\n",
        },
        2.0,
    ),
    "v2: a group with a colon": (
        {
            "proc/self/cgroup": "0::/a:b\n", "proc/self/mountinfo": V2,
            "sys/fs/cgroup/a:b/cpu.max": "200000 100000\n",
        },
        2.0,
    ),
    "v1: own group": (v1("250000\n"), 2.5),
    "v1: no limit": (v1("-1\n"), None),
    "v1: other period": (v1("30000\n", "20000\n"), 1.5),
    "v1: no period": (v1("250000\n", None), None),
    "v1: no quota": (v1(None), None),
    "v1: zero period": (v1("250000\n", "0\n"), None),
    "v1: the parent's": (v1("200000\n", place="kube/"), 2.0),
    "v1: the root's": (v1("200000\n", place=""), 2.0),
    "v1: cpuset's folder does not count": (
        v1(
            "-1\n",
            **{
                "sys/fs/cgroup/cpuset/cpu.cfs_quota_us": "100000\n",
                "sys/fs/cgroup/cpuset/cpu.cfs_period_us": "100000\n",
            },
        ),
        None,
    ),
    "v1: a container without a namespace": (
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/docker/0123\n",
            "proc/self/mountinfo": V1.replace(" / ", " /docker/0123 "),
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "350000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
        3.5,
    ),
    "v1: cpu alone": (
        {
            "proc/self/cgroup": "1:cpu:/x\n",
            "proc/self/mountinfo": "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n",
            "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "200000\n", "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n",
        },
        2.0,
    ),
    "both: the unified one is smaller": (
        v1("400000\n", **{"proc/self/mountinfo": V1 + V2.replace("cgroup rw", "cgroup/unified rw"),
                          "sys/fs/cgroup/unified/kube/cpu.max": "300000 100000\n"}),
        3.0,
    ),
    "both: the old one is smaller": (
        v1("200000\n", **{"proc/self/mountinfo": V1 + V2.replace("cgroup rw", "cgroup/unified rw"),
                          "sys/fs/cgroup/unified/kube/cpu.max": "300000 100000\n"}),
        2.0,
    ),
    "lines of another time": (
        {"proc/self/cgroup": "what\n::\n:\n0::/x\n", "proc/self/mountinfo": "what\n - \n1 2 - cgroup2\n\n" + V2,
         "sys/fs/cgroup/x/cpu.max": "200000 100000\n"},
        2.0,
    ),
    "groups without mounts": ({"proc/self/cgroup": "0::/x\n"}, None),
    "mounts without groups": ({"proc/self/mountinfo": V2, "sys/fs/cgroup/cpu.max": "200000 100000\n"}, None),
}  # fmt: skip


def plant(root: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(root)


@POSIX
@pytest.mark.parametrize("tree", TREES)
def test_quota(tree: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, expected = TREES[tree]
    root = plant(tmp_path, files)
    assert cpus.quota(root) == expected
    monkeypatch.setattr(cpus, "affinity", lambda: 5)
    assert cpus.available(root) == (5 if expected is None else max(1, min(5, int(expected))))


@POSIX
def test_quota_of_what_cannot_be_read(tmp_path: Path) -> None:
    """Folders where files are expected, bytes that are no text, a null byte in a path."""
    files = v2(kube="200000 100000\n")
    root = plant(tmp_path, files)
    (tmp_path / "sys/fs/cgroup/kube/pod/cpu.max").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cpu.max").write_bytes(b"\xff\xfe 100000\n")
    assert cpus.quota(root) == 2.0
    (tmp_path / "proc/self/mountinfo").write_text(V2 + V2.replace("/sys/fs/cgroup", "/a\\000b"))
    assert cpus.quota(root) == 2.0
    (tmp_path / "proc/self/mountinfo").write_bytes(b"\xff\n" + V2.encode())
    (tmp_path / "proc/self/cgroup").write_bytes(b"0::/kube/\xff\n")
    (tmp_path / "sys/fs/cgroup").joinpath("kube").joinpath(os.fsdecode(b"\xff")).mkdir()
    assert cpus.quota(root) == 2.0


@pytest.mark.parametrize(
    ("quota", "affinity", "n"), [(None, 3, 3), (1.99, 8, 1), (0.1, 8, 1), (2.0, 8, 2), (7.65, 8, 7), (9.0, 8, 8)]
)
def test_quotas_round_down(monkeypatch: pytest.MonkeyPatch, quota: float | None, affinity: int, n: int) -> None:
    monkeypatch.setattr(cpus, "quota", lambda root="/": quota)
    monkeypatch.setattr(cpus, "affinity", lambda: affinity)
    assert cpus.available() == n


def test_affinity_here() -> None:
    assert 1 <= cpus.affinity() <= (os.cpu_count() or 1)
    assert cpus.quota() is None or cpus.quota() > 0


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_affinity_is_the_main_threads() -> None:
    """A thread that ties itself to one CPU says nothing about the process; the process's own mask does."""
    seen = python("""
    import os, threading
    from qnative import cpus
    all_cpus = os.sched_getaffinity(0)
    found = []
    def tied():
        os.sched_setaffinity(0, {min(all_cpus)})
        found.append(cpus.affinity())
    thread = threading.Thread(target=tied)
    thread.start()
    thread.join()
    os.sched_setaffinity(0, {min(all_cpus)})
    print(found[0] == len(all_cpus), cpus.affinity())
    """)
    assert seen == "True 1"


# threadpoolctl


def test_threadpoolctl_lists_and_limits() -> None:
    threadpoolctl = pytest.importorskip("threadpoolctl")
    qn.set_num_threads(5)
    (ours,) = (entry for entry in threadpoolctl.threadpool_info() if entry["internal_api"] == "qnative")
    assert ours["user_api"] == "qnative" and ours["num_threads"] == 5 and ours["version"] == qn.__version__
    assert Path(ours["filepath"]) == LIBRARY.resolve() and ours["prefix"] == "qnative_threads"
    with threadpoolctl.threadpool_limits(limits=1):
        assert qn.get_num_threads() == 1
        with threadpoolctl.threadpool_limits(limits=3, user_api="qnative"):
            assert qn.get_num_threads() == 3
        assert qn.get_num_threads() == 1
    assert qn.get_num_threads() == 5
    with threadpoolctl.threadpool_limits(limits=1, user_api="blas"):
        assert qn.get_num_threads() == 5
    with threadpoolctl.threadpool_limits(limits={"qnative": 2}):
        assert qn.get_num_threads() == 2
    with qn.num_threads(4):
        with threadpoolctl.threadpool_limits(limits=2):
            assert qn.get_num_threads() == 2
        assert qn.get_num_threads() == 4
    assert qn.get_num_threads() == 5


SEEN = """
import threadpoolctl as t
before = qn.get_num_threads() if {ask} else None
with t.threadpool_limits(limits=1): limited = qn._core.get_num_threads()
print(sum(entry["internal_api"] == "qnative" for entry in t.threadpool_info()), limited)
"""
LAYER = "qn.QuantizedLinear.from_float(np.eye(4, dtype=np.float32))"


@pytest.mark.parametrize(
    "start",
    [
        "import threadpoolctl, qnative as qn",
        "import qnative as qn, threadpoolctl, numpy as np; " + LAYER,
        "import qnative as qn, threadpoolctl; qn.get_num_threads()",
        "import qnative as qn, threadpoolctl; qn.set_num_threads(2)",
        "import qnative as qn, threadpoolctl; qn.num_threads(2).__enter__()",
        "import qnative as qn; qn.threads.register_with_threadpoolctl()",
        "import threadpoolctl, qnative as qn; [qn.threads.register_with_threadpoolctl() for _ in range(3)]",
    ],
    ids=["before", "a layer", "get", "set", "block", "by hand", "by hand again"],
)
def test_threadpoolctl_whichever_comes_first(start: str) -> None:
    pytest.importorskip("threadpoolctl")
    assert python(start + "\nqn._core.set_num_threads(2)" + SEEN.format(ask=False)) == "1 1"


def test_threadpoolctl_that_comes_later_is_not_known() -> None:
    """The one case that wants the call by hand: nothing of qnative has run since threadpoolctl came."""
    pytest.importorskip("threadpoolctl")
    assert python("import qnative as qn; qn.set_num_threads(2)" + SEEN.format(ask=False)) == "0 2"
    assert python("import qnative as qn; qn.set_num_threads(2)" + SEEN.format(ask=True)) == "1 1"


@pytest.mark.parametrize("old", ["sys.modules['threadpoolctl'] = None", "sys.modules['threadpoolctl'] = sys"])
def test_threadpoolctl_that_is_missing_or_too_old(old: str) -> None:
    message = python(f"""
    import sys
    {old}
    import qnative as qn, numpy as np
    {LAYER}
    with qn.num_threads(2): pass
    try: qn.threads.register_with_threadpoolctl()
    except ImportError as error: print(error)
    """)
    assert message.startswith("threadpoolctl is ") and message.endswith(": pip install 'threadpoolctl>=3.2'")
