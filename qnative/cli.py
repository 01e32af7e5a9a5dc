"""The command line: ``qnative quantize | inspect | compare | verify | info | bench``.

Results go to standard output, as text or with ``--json`` as one JSON document; progress and errors go to standard
error. A command that fails prints one line that says what to do, and exits with 1 (2 for a wrong command line, 130 when
interrupted).
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

__all__ = ["main"]

_EXPECTED = (OSError, ValueError, TypeError, KeyError, RuntimeError, ImportError, MemoryError, OverflowError)


class _UsageError(Exception):
    """A wrong command line."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _UsageError(f"{message} (see `{self.prog} --help`)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments, without the program's name; those of the process by default.

    Returns
    -------
    int
        The exit status.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in arguments
    try:
        try:
            options = _parser().parse_args(arguments)
            text, document = options.run(options)
            sys.stdout.write(_json(document) if as_json else text)
            sys.stdout.write("\n")
            sys.stdout.flush()
            return 0
        except _UsageError as error:
            return _failed(str(error), as_json, 2)
        except BrokenPipeError:
            raise
        except _EXPECTED as error:
            return _failed(_message(error), as_json, 1)
    except KeyboardInterrupt:
        sys.stderr.write("\nqnative: interrupted; nothing was left half-written\n")
        return 130
    except BrokenPipeError:  # the reader has gone, as `| head` does; what Python would still flush goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _failed(message: str, as_json: bool, status: int) -> int:
    message = " ".join("".join(c if c.isprintable() else " " for c in message).split())
    if as_json:
        sys.stdout.write(_json({"error": message}) + "\n")
    sys.stderr.write(f"qnative: error: {message}\n")
    return status


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    if isinstance(error, KeyError) and error.args:
        return str(error.args[0])
    return str(error) or type(error).__name__


def _json(document: Any) -> str:
    import json

    return json.dumps(document, indent=1, allow_nan=False)


# The arguments


def _parser() -> argparse.ArgumentParser:
    common = _Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON document")
    working = _Parser(add_help=False)
    working.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, default=None,
        help="show progress on standard error (default: when that is a terminal)",
    )  # fmt: skip
    parser = _Parser(prog="qnative", description="Quantize models for CPU inference, and see what it cost.")
    parser.add_argument("--version", action="version", version=f"qnative {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[Any], tuple[str, Any]], text: str, *more: _Parser) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, parents=[common, *more], help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False
        )
        added.set_defaults(run=run)
        return added

    from qnative.config import CODE_DTYPES, SCALE_DTYPES, QuantGranularity, QuantMode
    from qnative.linear import ACTIVATIONS

    quantize = command("quantize", _quantize, "quantize a safetensors checkpoint", working)
    quantize.add_argument("input", metavar="IN", help="the float checkpoint (.safetensors)")
    quantize.add_argument("output", metavar="OUT", help="the model to write (.safetensors or .json)")
    quantize.add_argument("--dtype", default="int8", choices=[*CODE_DTYPES, "fp8"], help="of the codes (default: int8)")
    quantize.add_argument("--mode", default="symmetric", choices=list(map(str, QuantMode)), help="(default: symmetric)")
    quantize.add_argument(
        "--granularity", choices=[str(g) for g in QuantGranularity],
        help="(default: per_channel; per_group where --group-size is given)",
    )  # fmt: skip
    quantize.add_argument("--group-size", type=int, metavar="N", help="elements a group (per_group; default: 32)")
    quantize.add_argument("--scale-dtype", default="float32", choices=SCALE_DTYPES, help="(default: float32)")
    quantize.add_argument(
        "--activations", default="dynamic", choices=ACTIVATIONS, help="how inputs are quantized (default: dynamic)"
    )
    quantize.add_argument(
        "--include", action="append", default=[], metavar="PATTERN",
        help="quantize these too, e.g. '*embed*' (may be repeated)",
    )  # fmt: skip
    quantize.add_argument(
        "--exclude", action="append", default=[], metavar="PATTERN", help="leave these alone (may be repeated)"
    )
    quantize.add_argument(
        "--linear", action="append", default=[], metavar="PATTERN",
        help="these are linear layers, whatever their names say, e.g. '*embed_head*' (may be repeated)",
    )  # fmt: skip
    _add_transpose(quantize)
    quantize.add_argument(
        "--nan", default="raise", choices=["raise", "zero"],
        help="what NaN and infinities in weights do: fail, or become 0 and the ends of the range (default: raise)",
    )  # fmt: skip
    quantize.add_argument(
        "--activation", action="append", default=[], metavar="PATTERN=NAME",
        help="fuse relu, gelu, gelu_tanh or silu into these layers, e.g. '*intermediate.dense=gelu' (may be repeated)",
    )  # fmt: skip
    quantize.add_argument("--config", metavar="FILE", help="the model's own JSON configuration, kept in OUT")

    inspect = command("inspect", _inspect, "list what a model or any safetensors file holds")
    inspect.add_argument("file", metavar="FILE")

    compare = command("compare", _compare, "measure, layer by layer, what quantization cost", working)
    compare.add_argument("float", metavar="FLOAT", help="the float checkpoint")
    compare.add_argument("quantized", metavar="QUANTIZED", help="the model made from it")
    _add_transpose(compare)
    compare.add_argument("--picture", metavar="FILE", help="draw it too (.png, .svg, .pdf)")

    verify = command("verify", _verify, "check every byte of a saved model against its checksums")
    verify.add_argument("file", metavar="FILE")

    command("info", _info, "show the version, the CPU, the kernels and the threads")

    bench = command("bench", _bench, "time a layer against the machine's limits and NumPy's float32 product", working)
    bench.add_argument("--shape", action="append", metavar="M,K,N", help="rows, inputs, outputs (may be repeated)")
    bench.add_argument("--dtype", default="int8", choices=["int8", "int4", "fp8"], help="of weights (default: int8)")
    bench.add_argument("--seconds", type=float, default=0.3, metavar="S", help="a shape and contender (default: 0.3)")
    return parser


def _version() -> str:
    return str(sys.modules["qnative"].__version__)


def _add_transpose(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--transpose", action="append", default=[], metavar="PATTERN",
        help="weights stored (in, out), as GPT-2's Conv1D, e.g. '*c_attn*' (may be repeated)",
    )  # fmt: skip


# Progress


class _Bar:
    """One line on standard error, rewritten in place; nothing at all when it is not wanted."""

    def __init__(self, wanted: bool | None) -> None:
        self._terminal = sys.stderr.isatty()
        self._wanted = self._terminal if wanted is None else wanted
        self._width = 0

    def __call__(self, done: int, total: int | None, name: str) -> None:
        if not self._wanted:
            return
        filled = 24 * done // max(total or done, 1)
        name = "".join(c if c.isprintable() else "?" for c in name)[-48:]
        line = f"[{'=' * filled}{' ' * (24 - filled)}] {done}/{total or '?'} {name}"
        if self._terminal:
            sys.stderr.write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            sys.stderr.write(line + "\n")
        sys.stderr.flush()

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._wanted and self._terminal:
            sys.stderr.write("\r" + " " * self._width + "\r")
            sys.stderr.flush()


# quantize, inspect, compare, verify


def _quantize(options: Any) -> tuple[str, Any]:
    from qnative.config import QuantConfig, QuantGranularity, QuantMode
    from qnative.conversion import quantize_model
    from qnative.storage import printable

    granularity = options.granularity or ("per_group" if options.group_size is not None else "per_channel")
    group_size = options.group_size
    if granularity == QuantGranularity.PER_GROUP and group_size is None:
        group_size = 32
    config = QuantConfig(
        "float8_e4m3fn" if options.dtype == "fp8" else options.dtype,
        QuantMode(options.mode),
        QuantGranularity(granularity),
        group_size=group_size,
        scale_dtype=options.scale_dtype,
    )
    fused = {}
    for given in options.activation:
        pattern, equals, name = given.rpartition("=")
        if not equals or not pattern:
            raise _UsageError(f"--activation {given!r} must be PATTERN=NAME, such as '*intermediate.dense=gelu'")
        fused[pattern] = name
    if not options.output.lower().endswith((".safetensors", ".json")):
        raise _UsageError(f"OUT {options.output!r} must end in .safetensors or .json")
    folder = os.path.dirname(options.output)
    if folder and not os.path.isdir(folder):  # said now, not after the work
        raise FileNotFoundError(errno.ENOENT, "No such folder", folder)
    both = os.path.exists(options.output) and os.path.exists(options.input)
    if both and os.path.samefile(options.output, options.input):
        raise _UsageError("OUT is IN; the float checkpoint would be lost, so give another name")
    warnings = _Warnings()
    with _Bar(options.progress) as bar, warnings:
        model = quantize_model(
            options.input, config, options.activations, include=options.include, exclude=options.exclude,
            linear=options.linear, transpose=options.transpose, nan=options.nan, activation=fused,
            config_json=_own_config(options), progress=bar,
        )  # fmt: skip
        model.save(options.output)
    totals = model.totals
    size = os.path.getsize(options.output)
    known = [layer for layer in totals.layers if layer.sqnr is not None]
    weakest = min(known, key=lambda layer: layer.sqnr if layer.sqnr is not None else 0.0, default=None)
    lines = [f"{options.output}: {size:,} bytes", str(totals), f"{model.scheme}, {config!r}"]
    if weakest is not None:
        lines.append(f"weakest layer: {printable(weakest.name)}, {weakest.sqnr:.1f} dB")
    document = {
        "output": options.output, "file_bytes": size, "scheme": model.scheme, "config": config.to_dict(),
        "activations": options.activations, **totals.to_dict(), "warnings": warnings.messages,
    }  # fmt: skip
    return "\n".join(lines), document


def _own_config(options: Any) -> str | None:
    """Return the model's own configuration: the file that was named, or ``config.json`` beside the checkpoint."""
    path = options.config
    if path is None:
        path = os.path.join(os.path.dirname(options.input), "config.json")
        if not os.path.isfile(path):
            return None
    with open(path, encoding="utf-8") as file:
        text = file.read(1 << 20)
        if file.read(1):
            raise ValueError(f"{path}: a model's configuration has at most 1 MiB; name another file with --config")
    return text


class _Warnings:
    """Shows the library's warnings on standard error while a command runs, and keeps them."""

    def __init__(self) -> None:
        import logging

        self.messages: list[str] = []
        self._handler = logging.Handler(logging.WARNING)
        self._handler.emit = self._emit  # type: ignore[method-assign]
        self._logger = logging.getLogger("qnative")

    def _emit(self, record: Any) -> None:
        self.messages.append(record.getMessage())

    def __enter__(self) -> None:
        self._logger.addHandler(self._handler)

    def __exit__(self, *exception: object) -> None:
        self._logger.removeHandler(self._handler)
        from qnative.storage import printable

        for message in self.messages:
            sys.stderr.write(f"qnative: warning: {printable(message)}\n")


def _inspect(options: Any) -> tuple[str, Any]:
    from qnative.files import open_file
    from qnative.model import QuantizedModel
    from qnative.report import table

    with open_file(options.file) as file:
        found = list(file.tensors.values())
        tensors = [{"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "nbytes": t.nbytes} for t in found]
        own = file.document is not None
        size = file.size
        metadata = None if own else getattr(file, "metadata", None)
    document: dict[str, Any] = {"file": options.file, "file_bytes": size, "kind": "qnative" if own else "safetensors"}
    if not own:
        document |= {"metadata": metadata, "tensors": tensors}
        total = sum(t.nbytes for t in found)
        columns = ["name", "dtype", "shape", "nbytes"]
        return f"{options.file}: {len(tensors)} tensors, {total:,} bytes\n\n{table(tensors, columns)}", document
    model = QuantizedModel.load(options.file, mmap=True)
    totals = model.totals
    layers = []
    for layer in totals.layers:
        described = model.settings(layer.name)
        layers.append({**layer.to_dict(), "kind": described["kind"], **{k: described.get(k) for k in _SETTINGS}})
    untouched = [
        {"name": name, "shape": list(model.tensor(name).shape), "dtype": model.settings(name)["dtype"]}
        for name in model.names("untouched")
    ]
    document |= {
        "scheme": model.scheme, **totals.to_dict(), "layers": layers, "untouched_tensors": untouched,
        "config_json": model.config_json, "tensors": tensors,
    }  # fmt: skip
    rows = [
        {
            "layer": layer["name"], "kind": layer["kind"], "shape": layer["shape"], "codes": layer["config"]["dtype"],
            "mode": layer["config"]["mode"], "scales": _granularity(layer["config"]),
            "inputs": _inputs(layer["activations"]),
            "bytes": layer["bytes_after"], "ratio": layer["ratio"], "SQNR dB": layer["sqnr"],
        }
        for layer in layers
    ]  # fmt: skip
    columns = ["layer", "kind", "shape", "codes", "mode", "scales", "inputs", "bytes", "ratio", "SQNR dB"]
    text = f"{options.file}: {size:,} bytes, {model.scheme}\n{totals}\n\n{table(rows, columns)}"
    if untouched:
        text += f"\n\n{table(untouched, ['name', 'dtype', 'shape'])}"
    return text, document


_SETTINGS = ("activations", "activation", "output", "bias")


def _granularity(config: dict[str, Any]) -> str:
    name = str(config["granularity"]).replace("_", " ")
    return f"{name} of {config['group_size']}" if config["group_size"] else name


def _inputs(activations: Any) -> str:
    return f"static {activations['dtype']}" if isinstance(activations, dict) else activations or "-"


def _compare(options: Any) -> tuple[str, Any]:
    from qnative.model import QuantizedModel
    from qnative.report import compare, picture, table

    model = QuantizedModel.load(options.quantized, mmap=True)
    with _Bar(options.progress) as bar, _Warnings():
        reports = compare(options.float, model, progress=bar, transpose=options.transpose)
    if options.picture:
        picture(reports, options.picture)
    columns = ["name", "shape", "sqnr", "cosine", "max_error", "bits_per_weight", "codes_used", "entropy"]
    text = table(reports, columns)
    if options.picture:
        text += f"\n\npicture: {options.picture}"
    return text, {"layers": [r.to_dict() for r in reports], "picture": options.picture}


def _verify(options: Any) -> tuple[str, Any]:
    from qnative.files import open_file
    from qnative.model import QuantizedModel

    model = QuantizedModel.load(options.file, mmap=True, verify=True)
    with open_file(options.file) as file:
        tensors, size = len(file.tensors), file.size
    text = f"{options.file}: OK, {tensors} tensors, {size:,} bytes, {model.scheme}"
    return text, {"file": options.file, "ok": True, "tensors": tensors, "file_bytes": size, "scheme": model.scheme}


# info, bench


def _info(options: Any) -> tuple[str, Any]:
    import platform

    import numpy as np

    from qnative import _core, bench, cpus, threads

    document = {
        "version": _version(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "platform": platform.platform(),
        "cpu": bench.cpu_name(),
        "features": _core.cpu_features(),
        "kernels": _core.isas(),
        "kernel_in_use": _core.isa(),
        "QNATIVE_ISA": os.environ.get("QNATIVE_ISA"),
        "cpus_available": cpus.affinity(),
        "cpu_quota": cpus.quota(),
        "QNATIVE_NUM_THREADS": os.environ.get("QNATIVE_NUM_THREADS"),
        "threads_per_call": threads.get_num_threads(),
    }
    usable = [name for name, ok in _core.isas().items() if ok]
    lines = [
        f"qnative   {_version()}",
        f"python    {document['python']}, numpy {document['numpy']}, {document['platform']}",
        f"cpu       {document['cpu']}, {document['cpus_available']} available to this process" + (
            "" if document["cpu_quota"] is None else f", time of {document['cpu_quota']:g} by its control group"
        ),
        f"features  {', '.join(name for name, ok in _core.cpu_features().items() if ok) or 'none that matter here'}",
        f"kernels   {', '.join(usable)}; in use: {_core.isa()}" + (
            " (by QNATIVE_ISA)" if os.environ.get("QNATIVE_ISA") else ""
        ),
        f"threads   at most {document['threads_per_call']} a call" + (
            " (QNATIVE_NUM_THREADS is set)" if document["QNATIVE_NUM_THREADS"] else ""
        ),
    ]  # fmt: skip
    return "\n".join(lines), document


_SHAPES = ((1, 384, 384), (32, 384, 1536), (128, 768, 3072))


def _bench(options: Any) -> tuple[str, Any]:
    from qnative import bench
    from qnative.config import QuantConfig
    from qnative.report import table

    config = {
        "int8": QuantConfig.int8_per_channel(), "int4": QuantConfig.int4_per_group(32),
        "fp8": QuantConfig.fp8().per_channel(),
    }[options.dtype]  # fmt: skip
    shapes = [_shape(text) for text in options.shape] if options.shape else list(_SHAPES)
    if not 0.0 < options.seconds <= 60.0:
        raise _UsageError(f"--seconds {options.seconds} must be above 0 and at most 60")
    outcomes = []
    with _Bar(options.progress) as bar:
        for i, shape in enumerate(shapes):
            bar(i, len(shapes), "x".join(map(str, shape)))
            case = bench.linear_case(shape, config)
            outcomes.append(bench.race(case, options.seconds * len(case.contenders)))
    rows = [_bench_row(outcome) for outcome in outcomes]
    machine = bench.machine()
    lines = [
        f"{options.dtype} weights, dynamic activations, float32 in and out; kernel {machine['kernel']}, one thread",
        f"NumPy: its float32 product, {machine['blas'] or 'an unknown BLAS'}, "
        + (
            "one thread" if machine["blas"] else "threads as the environment sets them (threadpoolctl is not installed)"
        ),
        "limit: multiply-adds on registers alone; read: a loop that only reads the weights; all by turns in one run",
        *(f"{name}={value} is set, which changes NumPy's speed" for name, value in machine["blas_overrides"].items()),
    ]
    document = {
        "dtype": options.dtype, "machine": machine,
        "shapes": [row | {"case": o.to_dict()} for row, o in zip(rows, outcomes, strict=True)],
    }  # fmt: skip
    return "\n".join([*lines, "", table(rows)]), document


def _shape(text: str) -> tuple[int, int, int]:
    try:
        m, k, n = (int(part) for part in text.split(","))
    except ValueError:
        raise _UsageError(f"--shape {text!r} must be three whole numbers M,K,N") from None
    if min(m, k, n) < 1 or max(m * k, k * n, m * n) > 1 << 28:
        raise _UsageError(f"--shape {text!r}: sizes must be at least 1, and no matrix larger than 2^28 elements")
    return m, k, n


def _bench_row(outcome: Any) -> dict[str, Any]:
    from qnative.bench import OURS

    (numpy,), limit, read = outcome.names("float32"), outcome.best("limit"), outcome.best("read")
    m, k, n = outcome.case.shape
    return {
        "M": m, "K": k, "N": n,
        "qnative_us": outcome.seconds(OURS) * 1e6, "numpy_us": outcome.seconds(numpy) * 1e6,
        "ratio": outcome.ratio(OURS, numpy),
        "qnative_GOPS": outcome.rate(OURS) / 1e9, "numpy_GOPS": outcome.rate(numpy) / 1e9,
        "limit_GOPS": outcome.rate(limit) / 1e9, "of_limit": outcome.ratio(OURS, limit),
        "read_GOPS": outcome.rate(read) / 1e9 if read else None,
        "of_read": outcome.ratio(OURS, read) if read else None,
    }  # fmt: skip
