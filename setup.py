"""The build: which extensions there are and how C is compiled. All metadata is in pyproject.toml."""

import os
import platform
import subprocess
import sys
from glob import glob
from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# QNATIVE_DEBUG=1: bounds checks in Cython, no optimisation. QNATIVE_SANITIZE=1: address and undefined-behaviour checks.
DEBUG = os.environ.get("QNATIVE_DEBUG") == "1"
SANITIZE = os.environ.get("QNATIVE_SANITIZE") == "1"

C_SOURCES = [
    "csrc/qn_around_avx2.c",
    "csrc/qn_cpu.c",
    "csrc/qn_float_avx2.c",
    "csrc/qn_float_avx512.c",
    "csrc/qn_float_neon.c",
    "csrc/qn_gemm_scalar.c",
    "csrc/qn_gemm_avx2.c",
    "csrc/qn_gemm_avxvnni.c",
    "csrc/qn_gemm_vnni256.c",
    "csrc/qn_gemm_vnni.c",
    "csrc/qn_gemm_neon.c",
    "csrc/qn_gemm_dotprod.c",
    "csrc/qn_gemm_i8mm.c",
    "csrc/qn_groups.c",
    "csrc/qn_linear.c",
    "csrc/qn_pack.c",
    "csrc/qn_scratch.c",
]

if sys.platform == "win32":
    compile_args, link_args, libraries = ["/O2", "/fp:precise", "/std:c11"], [], []
else:
    compile_args = [
        "-std=c11",
        "-O0" if DEBUG else "-O3",
        "-ffp-contract=off",  # a product and a sum are two roundings on every machine unless fma is written out
        "-fno-math-errno",  # these two drop error flags, not values; without them rounding loops stay scalar
        "-fno-trapping-math",
        "-g0",  # Python's own flags ask for debug information, which is most of a wheel
    ]
    # Of Python's own flags, which CFLAGS in the environment would take the place of.
    if not SANITIZE:
        compile_args.append("-fwrapv")
    if not (DEBUG or SANITIZE):
        compile_args.append("-DNDEBUG")
    if platform.machine() in ("x86_64", "AMD64"):
        compile_args.append("-march=x86-64-v2")  # the floor every wheel runs on; faster kernels are chosen at import
    compile_args.append("-pthread")
    link_args, libraries = ["-pthread"], ["m"]
    if not (DEBUG or SANITIZE) and sys.platform.startswith("linux"):
        # Names that nobody looks up are a tenth of a wheel; pages of their own for constants are 4 KiB a module.
        link_args += ["-s", "-Wl,-z,noseparate-code"]
        compile_args.append("-fno-asynchronous-unwind-tables")  # 60 KB for debuggers only: nothing throws
    if sys.platform.startswith("linux"):
        link_args.append("-Wl,-z,nodelete")  # the pool's threads sleep in this code for as long as the process lives
    if DEBUG:
        compile_args.append("-g")
    if SANITIZE:
        # Python's own flags make signed overflow wrap around, which would then go unseen.
        compile_args += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-wrapv", "-g"]
        link_args += ["-fsanitize=address,undefined"]


# All that loops gain from -O3; the rest of it makes the code around them longer.
VECTORS = [] if DEBUG or sys.platform == "win32" else ["-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic"]


class BuildExtensions(build_ext):
    """Where the loops are in C files of their own, what Cython generates is compiled for size."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link an extension."""
        plain = getattr(self.compiler, "_compile", None)
        if plain is None or len(ext.sources) == 1 or DEBUG or SANITIZE:
            return super().build_extension(ext)

        def compile_one(target, source, suffix, cc_args, arguments, options):
            if Path(source).stem == ext.name.rpartition(".")[2]:
                arguments = [*arguments, "-Os"]
            plain(target, source, suffix, cc_args, arguments, options)

        self.compiler._compile = compile_one
        try:
            super().build_extension(ext)
        finally:
            self.compiler._compile = plain


def extension(name: str, *sources: str, small: bool = False, optimise: list[str] | None = None) -> Extension:
    """List an extension; `small` ones have no loop of their own that a compiler could make faster."""
    if SANITIZE and sys.platform != "win32":
        optimise = ["-O1"]  # checks after every access are not made faster by -O3, and it takes many times as long
    elif optimise is None:
        optimise = ["-Os"] if small and sys.platform != "win32" else []
    if sys.platform.startswith("linux") and name != "qnative_threads":  # whose pool is called by its name in tests
        optimise = [*optimise, "-fvisibility=hidden"]  # calls between C files go straight, without tables of names
    return Extension(
        f"qnative._core.{name}",
        [f"qnative/_core/{name}.pyx", *sources],
        include_dirs=["csrc", numpy.get_include()],
        define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION")],
        depends=[*glob("csrc/*.h"), "csrc/qn_gemm_vnni256.c", "csrc/qn_gemm_neon.c"],
        extra_compile_args=[*compile_args, *optimise],
        extra_link_args=link_args,
        libraries=libraries,
    )


def shared_utilities() -> Extension:
    """What Cython puts into every module that uses memoryviews, once for all of them: a fifth of a wheel."""
    source = Path("build/cython/_cyutility.c")
    source.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "cython", f"--generate-shared={source}"], check=True)
    shared = extension("_cyutility", small=True)
    shared.sources = [str(source)]
    return shared


setup(
    cmdclass={"build_ext": BuildExtensions},
    ext_modules=cythonize(
        [
            shared_utilities(),
            extension("elementwise", optimise=VECTORS),
            extension("fake_quant", optimise=VECTORS),
            extension("floats", optimise=VECTORS),
            extension("levels", small=True),
            extension("linear", *C_SOURCES, optimise=[] if DEBUG or sys.platform == "win32" else ["-O2"]),
            extension("limits", "csrc/qn_limits.c", optimise=VECTORS),
            extension("qnative_threads", "csrc/qn_pool.c", small=True),
            extension("statistics", optimise=VECTORS),
        ],
        build_dir="build/cython",
        shared_utility_qualified_name="qnative._core._cyutility",
        compiler_directives={
            "language_level": 3,
            "boundscheck": DEBUG,
            "wraparound": False,
            "initializedcheck": DEBUG,
            "cdivision": True,
            "freethreading_compatible": True,
        },
    ),
)
