"""A fuzzer of both file formats: whatever a file holds, it is refused with FormatError or works, in bounded memory.

    python tests/fuzz_files.py --files 1000000 --report fuzz.json

Guided by coverage where atheris is installed (``pip install atheris``), random with a seed where not. Files are mutated
by structure: values of the header, of the document within it and of the layers within that change, appear, double and
vanish while lengths, offsets and digests mostly stay right, so that what lies behind the first checks is reached too.
Each file is

1. opened and read whole: only FormatError, and what is accepted the reference library accepts too, with the same names,
   dtypes, shapes and bytes; what it accepts and qnative refuses must be refused for one of the rules that are stricter
   on purpose;
2. loaded as a model: only FormatError, or a model whose layers can be called and which can be saved;
3. quantized, if it is a checkpoint: only ValueError, or a model;
4. one file in 16, read with every allocation traced: at most twice the file's size and 16 MiB (16 times for JSON);
5. one file in 64, given to the command line: an exit status of 0 or 1, and nothing printed that moves a cursor.

The address space has a limit too, so a number that sizes an allocation ends as a MemoryError, which counts as a
failure.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import hashlib
import io
import json
import os
import random
import re
import resource
import signal
import struct
import sys
import tempfile
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import safetensors
import safetensors.numpy

try:
    import atheris
except ImportError:
    atheris = None

if atheris is not None and __name__ == "__main__" and "--blind" not in sys.argv:
    with atheris.instrument_imports(include=["qnative"], enable_loader_override=False):
        import qnative.checkpoint
        import qnative.conversion
        import qnative.files
        import qnative.model
import qnative as qn
from qnative import cli, files
from qnative.files import JSONFile, SafetensorsFile

MIB = 1 << 20
LONGEST = 32 << 10
TRACED = 16
COMMANDS = 64
CONFIGS = (
    qn.QuantConfig.int8_per_channel(), qn.QuantConfig.int8().asymmetric(), qn.QuantConfig.int4_per_group(8),
    qn.QuantConfig.fp8().per_channel(), qn.QuantConfig.int4_per_group(3).asymmetric().with_scale_dtype("float16"),
)  # fmt: skip

#: Rules of qnative's that the reference library does not have; everything else must be judged as it judges.
STRICTER = re.compile(
    r"appears twice|unknown key|out of proportion|its JSON would take|not valid JSON|beyond 64 bits|beyond what a float"
    r"|dtype \S+ is not one that qnative reads|beyond what an array can have|dimensions; an array has at most"
    r"|qnative_|no qnative_format|nested too deeply|NaN is not|Infinity is not"
    r"|must be an object of checksums|missing key 'qnative"
)

INTERESTING = [
    0, 1, -1, 2, 3, 4, 7, 8, 9, 16, 31, 32, 63, 64, 65, 127, 128, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32,
    2**32 + 1, 2**40, 2**53, 2**60, 2**62, 2**63 - 1, 2**63, 2**64 -1, 2**64, 10**30, 0.0, -0.0, 0.5, 1.0, 1e-45,
    1e39, 1e308, None, True, False, "", "0", "inf", "nan", "int8", "uint8", "int4", "uint4", "float8_e4m3fn",
    "float8_e5m2", "float32", "float16", "bfloat16", "per_tensor", "per_channel", "per_group", "symmetric",
    "asymmetric", "linear", "tensor", "dynamic", "dynamic_symmetric", "float", "relu", "gelu", "silu",
    "mixed-precision", "dense", "pack-quantized", "BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "U16",
    "I16", "F16", "BF16", "I32", "U32", "F32", "F64", "I64", "U64", "C64", "\ud800", "\x00", "é", "x" * 300, [], {},
    [[]], [0], [1, 1], [0, 0], [2**63 - 1, 2**63 - 1],
]  # fmt: skip


# Mutation


class Pairs(list[tuple[str, Any]]):
    """A JSON object as its members in order, doubles and all."""


def parse(text: bytes | str) -> Any:
    return json.loads(text, object_pairs_hook=Pairs)


def dump(value: Any) -> str:
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{json.dumps(k)}:{dump(v)}" for k, v in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(dump(v) for v in value) + "]"
    return json.dumps(value)


def places(value: Any) -> list[tuple[Any, int]]:
    """Every member of every container: (container, index)."""
    found, open_ = [], [value]
    while open_:
        container = open_.pop()
        for i, inner in enumerate(container):
            found.append((container, i))
            inner = inner[1] if isinstance(container, Pairs) else inner
            if isinstance(inner, list):
                open_.append(inner)
    return found


def interesting(rng: random.Random) -> Any:
    """One of INTERESTING, a copy: a list that was part of two documents, or of itself, would change both."""
    return copy.deepcopy(rng.choice(INTERESTING))


def nearby(value: Any, rng: random.Random) -> Any:
    """Another value, often one of the same kind."""
    if isinstance(value, bool) or rng.random() < 0.4:
        return interesting(rng)
    if isinstance(value, int):
        return rng.choice(
            [value + 1, value - 1, -value, value * 2, value // 2, value + (1 << rng.randrange(66)), float(value)]
        )
    if isinstance(value, float):
        return rng.choice([-value, value * 1e30, value / 1e30, int(value) if abs(value) < 1e9 else 0])
    if isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        if value[:1] in ("{", "[") and rng.random() < 0.8:
            try:
                return dump(mutated(parse(value), rng))
            except (ValueError, RecursionError):
                pass
        return rng.choice(
            [value[:at] + value[at + 1 :], value[:at] + chr(rng.randrange(128)) + value[at:], value.upper(), value * 2]
        )
    if isinstance(value, list) and value:
        return (
            rng.choice([value[:-1], [*value, value[-1]], value[::-1]])
            if not isinstance(value, Pairs)
            else Pairs(value[:-1])
        )
    return interesting(rng)


def mutated(document: Any, rng: random.Random) -> Any:
    """Change one to four places of a JSON document, in place where it is a container."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        found = places(document) if isinstance(document, list) else []
        if not found:
            return nearby(document, rng)
        container, i = rng.choice(found)
        how = rng.random()
        if isinstance(container, Pairs):
            key, value = container[i]
            if how < 0.7:
                container[i] = (key, nearby(value, rng))
            elif how < 0.78:
                del container[i]
            elif how < 0.84:
                container.append((key, value))
            elif how < 0.92:
                container[i] = (nearby(key, rng) if rng.random() < 0.5 else rng.choice(container)[0], value)
                container[i] = (str(container[i][0]), value)
            else:
                container.append((str(nearby(key, rng)), nearby(value, rng)))
        elif how < 0.8:
            container[i] = nearby(container[i], rng)
        elif how < 0.9:
            del container[i]
        else:
            container.insert(i, container[i])
    return document


def split(content: bytes) -> tuple[bytes, bytes]:
    """The header and the data of a safetensors file, as far as there are any."""
    length = int.from_bytes(content[:8], "little")
    return content[8 : 8 + length], content[8 + length :]


def joined(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", (len(header) if length is None else length) % 2**64) + header + data


def sealed(header: bytes, data: bytes) -> bytes:
    """A header whose digests are those of its data and of itself, as far as it has places for them."""
    try:
        document = dict(parse(header))
        metadata = dict(document["__metadata__"])
        crcs = {name: "00000000" for name in document if name != "__metadata__"}
        for name in crcs:
            start, stop = dict(document[name])["data_offsets"]
            crcs[name] = f"{zlib.crc32(data[start:stop]):08x}"
        metadata |= {"qnative_crc32": json.dumps(crcs), "qnative_sha256": hashlib.sha256(data).hexdigest()}
        metadata["qnative_header_sha256"] = "0" * 64
        document["__metadata__"] = Pairs(metadata.items())
        blank = dump(Pairs(document.items())).encode()
        return blank.replace(b"0" * 64, hashlib.sha256(blank).hexdigest().encode(), 1)
    except (ValueError, TypeError, KeyError, RecursionError):
        return header


def sealed_json(text: bytes) -> bytes:
    said = re.search(rb'"qnative_sha256": ?"([0-9a-f]{64})"', text)
    if not said:
        return text
    digest = hashlib.sha256(text.replace(said[1], b"0" * 64, 1)).hexdigest().encode()
    return text.replace(said[1], digest, 1)


def noise(content: bytes, rng: random.Random) -> bytes:
    """Bytes changed, removed, inserted, doubled, cut off."""
    for _ in range(rng.choice((1, 1, 2, 8))):
        at, how = rng.randrange(len(content) + 1), rng.randrange(5)
        if how == 0 and at < len(content):
            content = content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
        elif how == 1:
            content = content[:at] + content[at + rng.randrange(9) :]
        elif how == 2:
            content = content[:at] + rng.randbytes(rng.randrange(1, 9)) + content[at:]
        elif how == 3:
            content = content[:at] + content[at : at + 40] + content[at:]
        elif how == 4 and rng.random() < 0.3:
            content = content[:at]
    return content


def hollowed(header: bytes, data: bytes, rng: random.Random) -> tuple[bytes, bytes]:
    """Weights of no elements that claim any size, for which no byte vouches."""
    entries = parse(header)
    parts = {}
    for name, entry in entries:
        if name != "__metadata__":
            start, stop = dict(entry)["data_offsets"]
            parts[name] = [dict(entry), data[start:stop]]
    for name in [n for n in parts if n.endswith(("weight", "weight_packed")) and rng.random() < 0.7]:
        shape = [rng.choice((0, 1, 3, 2**20, 2**33, 2**40, 2**58, 2**59, 2**62)) for _ in parts[name][0]["shape"]]
        shape[rng.randrange(len(shape))] = 0
        parts[name] = [parts[name][0] | {"shape": shape}, b""]
        logical = name.replace("weight_packed", "weight_shape")
        if logical != name and logical in parts:
            parts[logical][1] = np.array(shape, np.int64).tobytes()
    found, data = Pairs((n, e) for n, e in entries if n == "__metadata__"), b""
    for name, (entry, content) in parts.items():
        entry["data_offsets"] = [len(data), len(data) + len(content)]
        found.append((name, Pairs(entry.items())))
        data += content
    return dump(found).encode("utf-8", "surrogatepass"), data


def mutate(content: bytes, seed: int, blind: Callable[[bytes], bytes] | None = None) -> bytes:
    """One file from another; `blind` changes bytes without knowing what they are."""
    rng = random.Random(seed)
    blind = blind or (lambda b: noise(b, rng))
    how = rng.random()
    if how < 0.1:
        return blind(content)
    try:
        if content[:1] == b"{" and content[7:8] != b"\0":
            if how < 0.2:
                return sealed_json(blind(content))
            return sealed_json(dump(mutated(parse(content), rng)).encode("utf-8", "surrogatepass"))
        header, data = split(content)
        if how < 0.2:
            header = blind(header)
        elif how < 0.35:
            data = blind(data)
        elif how < 0.4:
            header, data = hollowed(header, data, rng)
        else:
            header = dump(mutated(parse(header), rng)).encode("utf-8", "surrogatepass")
        if rng.random() < 0.5:
            header = sealed(header, data)
        length = len(header) + rng.choice((1, -1, 8, 2**32, 2**63)) if rng.random() < 0.02 else None
        return joined(header, data, length)
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError, OverflowError):
        return blind(content)


# Judgement


class Judge:
    """Feeds files to the readers, counts what becomes of them, and raises AssertionError at anything unexpected."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.counts: collections.Counter[str] = collections.Counter()
        self.most_traced = 0.0

    def file(self, content: bytes, suffix: str) -> str:
        path = os.path.join(self.folder, f"fuzzed{suffix}")
        with open(path, "wb") as file:
            file.write(content)
        return path

    def __call__(self, content: bytes) -> None:
        self.counts["files"] += 1
        is_json = content[:1] == b"{" and content[7:8] != b"\0"
        path = self.file(content, ".json" if is_json else ".safetensors")
        trace = self.counts["files"] % TRACED == 0
        if trace:
            tracemalloc.start()
        try:
            (self.json_container if is_json else self.safetensors_container)(path, content)
            if b"qnative_format" in content:  # else the load ends where the reading did
                self.model(path)
            elif not is_json:
                self.checkpoint(path, len(content))
            if self.counts["files"] % COMMANDS == 0:
                self.command(path)
            self.traced(len(content), is_json)
        finally:
            tracemalloc.stop()

    def traced(self, size: int, is_json: bool) -> None:
        """Judge what was allocated so far, if that is traced, and trace no more."""
        if not tracemalloc.is_tracing():
            return
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak <= (16 if is_json else 2) * size + 16 * MIB, f"{peak} bytes for a file of {size}"
        self.most_traced = max(self.most_traced, peak)

    def json_container(self, path: str, content: bytes) -> None:
        try:
            with JSONFile(path) as file:
                for name in file.tensors:
                    file.read(name)
                file.verify()
            self.counts["JSON accepted"] += 1
        except qn.FormatError as error:
            assert os.path.basename(path) in str(error), "the message must name the file"
            self.counts["JSON refused"] += 1

    def safetensors_container(self, path: str, content: bytes) -> None:
        refusal, ours = None, {}
        try:
            with SafetensorsFile(path) as file:
                for name, info in file.tensors.items():
                    ours[name] = (info.dtype, list(info.shape), file.read(name).tobytes())
        except qn.FormatError as error:
            refusal = str(error)
            assert os.path.basename(path) in refusal, "the message must name the file"
        cheap = len(content) < LONGEST and not (refusal and "out of proportion" in refusal)
        if refusal is None:
            theirs = {name: (t["dtype"], t["shape"], bytes(t["data"])) for name, t in safetensors.deserialize(content)}
            assert ours == theirs, "the reference library reads something else"
            self.counts["safetensors accepted"] += 1
            return
        self.counts["safetensors refused"] += 1
        if not cheap:
            return
        try:
            safetensors.deserialize(content)
        except safetensors.SafetensorError:
            return
        assert STRICTER.search(refusal), f"the reference library accepts what is refused: {refusal}"
        self.counts["refused by rules of qnative's own"] += 1

    def checkpoint(self, path: str, number: int) -> None:
        try:
            config, nan = CONFIGS[number % len(CONFIGS)], ("zero", "raise")[number // 8 % 2]
            with np.errstate(all="ignore"):
                model = qn.quantize_model(path, config, include="*", nan=nan)
                for name in model.names("linear"):
                    model[name](np.ones((1, model[name].in_features), np.float32))
            self.counts["checkpoints quantized"] += 1
        except ValueError:
            self.counts["checkpoints refused"] += 1

    def command(self, path: str) -> None:
        said = io.StringIO()
        name = ("inspect", "verify", "inspect", "compare")[self.counts["commands"] % 4]
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            status = cli.main([name, path] + [path] * (name == "compare"))
        assert status in (0, 1), f"{name} ended with {status}"
        assert said.getvalue().replace("\n", "").isprintable(), f"{name} printed what a file holds as it is"
        self.counts["commands"] += 1

    def model(self, path: str) -> None:
        try:
            model = qn.QuantizedModel.load(path)
        except qn.FormatError:
            self.counts["models refused"] += 1
            return
        self.counts["models loaded"] += 1
        for name in model.names("linear"):
            model[name]  # packed, which the limit includes; what calls and saving take is another matter
        self.traced(os.path.getsize(path), path.endswith(".json"))
        try:
            qn.QuantizedModel.verify(path)
            self.counts["models verified"] += 1
        except qn.FormatError:
            pass
        with np.errstate(all="ignore"):
            for name in model.names("linear"):
                layer = model[name]
                layer(np.ones((1, layer.in_features), np.float32))
            for name in model.names("tensor"):
                model[name].dequantize()
        if self.counts["models loaded"] % 8 == 0:
            again = os.path.join(self.folder, f"again{os.path.splitext(path)[1]}")
            model.save(again)
            qn.QuantizedModel.verify(again)


# Seeds


def seeds() -> list[bytes]:
    """Small valid files of every kind."""
    rng = np.random.default_rng(0)

    def weight(n: int, k: int) -> np.ndarray[Any, Any]:
        return rng.standard_normal((n, k)).astype(np.float32)

    found = [joined(b"{}", b""), joined(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8))]
    every = {code: s.numpy.itemsize for code, s in files.STORAGE.items()}
    entries, offset = {}, 0
    for code, size in every.items():
        entries[code.lower()] = {"dtype": code, "shape": [2, 1], "data_offsets": [offset, offset + 2 * size]}
        offset += 2 * size
    found.append(joined(json.dumps({"__metadata__": {"a": "b"}, **entries}).encode(), bytes(offset)))
    for dtype in (np.float32, np.float16):
        params = {"a.weight": weight(5, 11), "a.bias": np.ones(5, np.float32), "embed.weight": weight(3, 4)}
        params |= {"b.weight": weight(2, 3), "c.weight": weight(2, 6).reshape(2, 2, 3)}
        found.append(safetensors.numpy.save({name: x.astype(dtype) for name, x in params.items()}))
    configs = [
        qn.QuantConfig.int8(), qn.QuantConfig.int8_per_channel().asymmetric(), qn.QuantConfig.int4(),
        qn.QuantConfig.int4_per_group(8).asymmetric(), qn.QuantConfig.int4_per_group(3), qn.QuantConfig.fp8(),
        qn.QuantConfig.fp8("float8_e5m2").per_channel(), qn.QuantConfig.int8().per_group(8),
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for i, config in enumerate(configs):
            params = {"a.weight": weight(5, 11), "a.bias": np.ones(5, np.float32), "norm": np.ones(3, np.float16)}
            params |= {"b.weight": weight(2, 8), "c.weight": weight(2, 16).reshape(2, 2, 8)}
            model = qn.quantize_model(params, config, activations="float" if config.info.is_float else "dynamic")
            for suffix in (".safetensors", ".json"):
                path = Path(folder) / f"m{i}{suffix}"
                model.save(path)
                found.append(path.read_bytes())
    return found


# Running


def limit_memory(more: int) -> None:
    """No more address space than there is now, and so much."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + more, resource.RLIM_INFINITY))


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def too_long(*_: object) -> NoReturn:
    raise AssertionError("a file took more than 20 seconds of processor time")


def run(count: int, seed: int, seconds: float, report: str | None, guided: bool) -> None:
    base = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=base) as folder:
        judge, pool, started, warm = Judge(folder), seeds(), time.monotonic(), 0
        for content in pool:
            judge(content)
        spare = 512 * MIB if guided else 128 * MIB
        limit_memory(spare)
        signal.signal(signal.SIGVTALRM, too_long)  # of processor time: the machine may have other things to do

        def one(content: bytes) -> None:
            nonlocal warm
            signal.setitimer(signal.ITIMER_VIRTUAL, 20)
            judge(content)
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            if judge.counts["files"] == 2000:
                warm = resident()
            if judge.counts["files"] % 10_000 == 0:
                summary()
                limit_memory(spare)  # anew, as the tracer has taken some of it

        def summary() -> None:
            # What resident memory grows by is the tracer's, which keeps half a kilobyte of every file for good.
            found = {
                **judge.counts, "seconds": round(time.monotonic() - started), "guided": guided, "failures": 0,
                "most bytes traced": judge.most_traced, "resident bytes grown": resident() - warm if warm else None,
            }  # fmt: skip
            if report:
                Path(report).write_text(json.dumps(found, indent=1) + "\n")
            print(json.dumps(found), flush=True)

        if guided:
            corpus = Path(folder) / "corpus"
            corpus.mkdir()
            for i, content in enumerate(pool):
                (corpus / str(i)).write_bytes(content)

            def mutator(content: bytes, most: int, number: int) -> bytes:
                return mutate(bytes(content), number, lambda b: atheris.Mutate(b, max(len(b) + 16, 64)))[:most]

            more = [f"-max_total_time={seconds:.0f}"] if seconds else []
            atheris.Setup(
                [sys.argv[0], f"-runs={count}", f"-seed={seed + 1}", f"-max_len={LONGEST}", "-rss_limit_mb=0",
                 "-print_final_stats=1", *more, str(corpus)],
                one, custom_mutator=mutator,
            )  # fmt: skip
            atheris.Fuzz()
            return
        rng, good = random.Random(seed), list(pool)
        while judge.counts["files"] < count and not (seconds and time.monotonic() - started > seconds):
            number = rng.randrange(2**63)
            content = mutate(rng.choice(good if rng.random() < 0.6 else pool), number)
            if len(content) > LONGEST:
                continue
            try:
                one(content)
            except BaseException:
                Path("fuzz-failure").write_bytes(content)
                print(f"failed: number {number}, seed {seed}; the file is in ./fuzz-failure", file=sys.stderr)
                raise
            if rng.random() < 0.02:
                pool.append(content)
                if len(pool) > 400:
                    pool.pop(rng.randrange(len(pool)))
        summary()


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Fuzz the readers of both file formats.")
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0, help="stop after so many (0: never)")
    parser.add_argument("--report", help="a JSON file of counts, written now and then")
    parser.add_argument("--blind", action="store_true", help="do not be guided by coverage")
    options = parser.parse_args(None if arguments is None else list(arguments))
    run(options.files, options.seed, options.seconds, options.report, atheris is not None and not options.blind)


if __name__ == "__main__":
    main()
