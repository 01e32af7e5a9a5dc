"""What quantization cost, layer by layer: as data, as a table, as a picture."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qnative import _core
from qnative.config import QuantConfig
from qnative.floats import decode
from qnative.model import QuantizedModel
from qnative.selection import Patterns, Source, Transposed, layer_name, named_tensors, widen
from qnative.stats import finite_original
from qnative.storage import printable
from qnative.tensor import QuantizedTensor, error_measures
from qnative.work import reporting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["LayerReport", "compare", "picture", "report_tensor", "table"]


@dataclass(frozen=True)
class LayerReport:
    """How one quantized weight differs from its original, and how it uses its codes.

    Attributes
    ----------
    name : str
        The layer.
    shape : tuple of int
        The weight's shape.
    config : QuantConfig
        How it is quantized.
    sqnr : float
        Signal to quantization noise in dB; inf where nothing was lost.
    cosine : float
        Cosine similarity of the weight and its original, both as one long vector.
    max_error : float
        The largest absolute difference of an element.
    bits_per_weight : float
        Scales and zero points included.
    nbytes : int
        Of codes, scales and zero points.
    codes : tuple of float
        What the histogram counts: the codes in ascending order (of float8 the decoded values, without their scale).
    histogram : tuple of int
        How many elements have each code.
    """

    name: str
    shape: tuple[int, ...]
    config: QuantConfig
    sqnr: float
    cosine: float
    max_error: float
    bits_per_weight: float
    nbytes: int
    codes: tuple[float, ...]
    histogram: tuple[int, ...]

    @property
    def codes_used(self) -> float:
        """The share of the codes that some element has."""
        return sum(count > 0 for count in self.histogram) / len(self.histogram)

    @property
    def entropy(self) -> float:
        """Bits of information in a code; close to the code's own bits when all codes are used alike."""
        counts = np.array([c for c in self.histogram if c], np.float64)
        share = counts / max(counts.sum(), 1.0)
        return float(-(share * np.log2(share)).sum()) + 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON can hold it (an infinite SQNR is ``"inf"``)."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "config": self.config.to_dict(),
            "sqnr": self.sqnr if math.isfinite(self.sqnr) else str(self.sqnr),
            "cosine": self.cosine,
            "max_error": self.max_error,
            "bits_per_weight": self.bits_per_weight,
            "nbytes": self.nbytes,
            "codes_used": self.codes_used,
            "entropy": self.entropy,
            "codes": list(self.codes),
            "histogram": list(self.histogram),
        }


def report_tensor(name: str, x: ArrayLike, quantized: QuantizedTensor) -> LayerReport:
    """Compare one quantized tensor with its original, a few rows at a time.

    Parameters
    ----------
    name : str
        What the report calls it.
    x : array_like of float
        The original, of the tensor's shape; what is not finite in it counts as kept exactly.
    quantized : QuantizedTensor
        The tensor.

    Returns
    -------
    LayerReport
    """
    measures = error_measures(finite_original(np.asarray(x), quantized), quantized)
    codes, histogram = _histogram(quantized)
    return LayerReport(
        name, quantized.shape, quantized.config, **measures,
        bits_per_weight=quantized.bits_per_weight, nbytes=quantized.nbytes, codes=codes, histogram=histogram,
    )  # fmt: skip


def _histogram(quantized: QuantizedTensor) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Count the codes, in ascending order of what they stand for."""
    counts = np.zeros(256, np.int64)
    for block in quantized._blocks():
        codes_of_block = np.ascontiguousarray(quantized._codes_of(block)).reshape(-1)
        _core.histogram_of_codes(codes_of_block.view(np.uint8), counts)
    config = quantized.config
    if config.info.is_float:
        values = decode(np.arange(256, dtype=np.uint8), config.dtype)
        kept = np.flatnonzero(np.isfinite(values))
        order = kept[np.argsort(values[kept], kind="stable")]
        return tuple(values[order].tolist()), tuple(counts[order].tolist())
    codes = np.arange(int(config.quant_min), int(config.quant_max) + 1)
    return tuple(codes.tolist()), tuple(counts[codes & 0xFF].tolist())


def compare(
    source: Source,
    quantized: QuantizedModel | Mapping[str, Any],
    progress: Callable[[int, int | None, str], Any] | bool | None = None,
    *,
    transpose: Patterns = None,
) -> list[LayerReport]:
    """Compare a quantized model, layer by layer, with the checkpoint it was made from.

    Parameters
    ----------
    source : mapping, iterable of pairs, or path-like
        The float parameters, as `quantize_model` takes them; read one at a time.
    quantized : QuantizedModel or mapping
        The model, or what `quantize_named_parameters` returned.
    progress : callable or bool, optional
        As for `quantize_model`.
    transpose : str or iterable of str, optional
        The patterns that `quantize_model` was given.

    Returns
    -------
    list of LayerReport
        One for each quantized weight, in the model's order.

    Raises
    ------
    ValueError
        If the checkpoint lacks a weight of the model, or has it in another shape.
    """
    if isinstance(quantized, QuantizedModel):
        find: Callable[[str], Any] = quantized.tensor
        names = [layer.name for layer in quantized.totals.layers]
    else:
        find = quantized.__getitem__
        names = [name for name, value in quantized.items() if isinstance(value, QuantizedTensor)]
    found: dict[str, LayerReport | None] = dict.fromkeys(names)
    transposed = Transposed(transpose)
    with named_tensors(source) as (tensors, total), reporting(progress, total, "tensor") as report_progress:
        for done, tensor in enumerate(tensors, 1):
            name = tensor.name if tensor.name in found else layer_name(tensor.name)
            if name in found:
                weight = find(name)
                turned = transposed(tensor.name, tensor.shape)
                shape = tensor.shape[::-1] if turned else tensor.shape
                if shape != weight.shape:
                    hint = f"; pass transpose={name!r}" if shape[::-1] == weight.shape and not turned else ""
                    raise ValueError(f"{name}: the checkpoint has shape {shape}, the model {weight.shape}{hint}")
                x = widen(tensor.load(), tensor.dtype)
                found[name] = report_tensor(name, x.T if turned else x, weight)
                del x
            report_progress(done, tensor.name)
            del tensor
    transposed.report()
    reports = [report for report in found.values() if report is not None]
    if len(reports) < len(found):
        missing = [name for name, report in found.items() if report is None]
        raise ValueError(
            f"the checkpoint lacks {missing[0]!r} and {len(missing) - 1} more of {len(found)} layers; "
            "compare with the checkpoint that the model was made from"
        )
    return reports


# Tables


def table(rows: Iterable[Any], columns: Sequence[str] | None = None) -> str:
    """Lay rows out as aligned plain text: numbers to the right, everything else to the left.

    Parameters
    ----------
    rows : iterable of mappings, or of objects with ``to_dict``
        The rows; `LayerReport` and `LayerStats` among them.
    columns : sequence of str, optional
        Which keys, in which order; by default those of the first row that hold no lists or mappings.

    Returns
    -------
    str
        A heading, a rule and a line a row; without a final newline.
    """
    dicts = [row if isinstance(row, Mapping) else row.to_dict() for row in rows]
    if columns is None:
        first = dicts[0] if dicts else {}
        columns = [key for key, value in first.items() if not isinstance(value, (list, tuple, dict))]
    cells = [[_cell(row.get(key)) for key in columns] for row in dicts]
    heads = [key.replace("_", " ") for key in columns]
    widths = [max(len(line[i]) for line in [heads, *cells]) for i in range(len(columns))]
    right = [all(_is_number(row.get(key)) for row in dicts) for key in columns]

    def line(texts: Sequence[str]) -> str:
        padded = (t.rjust(w) if r else t.ljust(w) for t, w, r in zip(texts, widths, right, strict=True))
        return "  ".join(padded).rstrip()

    return "\n".join([line(heads), "  ".join("-" * w for w in widths), *map(line, cells)])


def _is_number(value: Any) -> bool:
    return value is None or value in ("inf", "-inf") or isinstance(value, (int, float))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        text = f"{value:.2f}" if 10 <= abs(value) < 1e5 else f"{value:.4g}"
        return f"{value:.6f}" if text == "1" and value != 1.0 else text  # cosines differ from 1 after four digits
    if isinstance(value, (list, tuple)):
        return "x".join(map(str, value)) or "()"
    return printable(str(value))


# Pictures

_INK = "#1f2430"
_QUIET = "#6b7280"
_BAR = "#3d6fb4"
_WEAK = "#d9623b"
_LINE = "#e3e6eb"


def picture(reports: Iterable[LayerReport], path: str | os.PathLike[str], title: str | None = None) -> None:
    """Draw SQNR layer by layer beside each layer's histogram of codes, and save the picture.

    Each row is a layer: a bar for its SQNR (the weakest three in another colour) and a strip that is darker where
    more of its elements lie. Below, the histograms of the weakest, the middle and the best layer in full.

    Parameters
    ----------
    reports : iterable of LayerReport
        As `compare` returns them.
    path : path-like
        ``.png``, ``.svg``, ``.pdf`` ...: matplotlib chooses by the suffix.
    title : str, optional
        The heading.

    Raises
    ------
    ValueError
        If there is no report.
    ImportError
        Without matplotlib.
    """
    rows = list(reports)
    if not rows:
        raise ValueError("no layer to draw; compare() gave an empty list")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("a picture needs matplotlib: pip install 'qnative[plot]'") from None

    top = min(0.2 * len(rows) + 0.9, 60.0)
    figure = Figure(figsize=(12.0, top + 3.6), facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=[top, 2.6]).ravel()
    bars, strips = upper.subplots(1, 2, sharey=True, width_ratios=[1.1, 1])
    _draw_bars(bars, rows)
    _draw_strips(strips, rows)
    ranked = sorted(rows, key=lambda r: math.inf if math.isnan(r.sqnr) else r.sqnr)
    chosen = {"weakest": ranked[0], "middle": ranked[len(ranked) // 2], "best": ranked[-1]}
    for axes, (which, report) in zip(lower.subplots(1, 3), chosen.items(), strict=True):
        _draw_histogram(axes, report, which)
    if title is None:
        title = f"What quantization cost: {len(rows)} layers, {_config_name(rows)}"
    figure.suptitle(_plain(title), x=0.01, ha="left", fontsize=14, fontweight="bold", color=_INK, parse_math=False)
    figure.savefig(os.fsdecode(path), dpi=130)


def _plain(text: str, limit: int = 200) -> str:
    """Return text that any font has; the middle of a long name left out."""
    text = text.encode("ascii", "backslashreplace").decode("ascii")
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= limit else f"{text[: limit // 2 - 2]} .. {text[-(limit // 2 - 2) :]}"


def _config_name(rows: Sequence[LayerReport]) -> str:
    names = dict.fromkeys(f"{r.config.dtype} {r.config.mode} {r.config.granularity}".replace("_", " ") for r in rows)
    return next(iter(names)) if len(names) == 1 else f"{len(names)} configurations"


def _sqnr_text(report: LayerReport) -> str:
    return f"{report.sqnr:.1f}" if math.isfinite(report.sqnr) else "exact" if report.sqnr > 0 else "lost"


def _clean(axes: Axes, grid: str | None = None) -> None:
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0, colors=_QUIET, labelsize=8)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis=grid, color=_LINE, linewidth=0.8)  # type: ignore[arg-type]


def _draw_bars(axes: Axes, rows: Sequence[LayerReport]) -> None:
    finite = [r.sqnr for r in rows if math.isfinite(r.sqnr)]
    longest = max([*finite, 1.0])
    weak = set(sorted(range(len(rows)), key=lambda i: rows[i].sqnr)[:3]) if len(rows) > 3 else set()
    lengths = [min(max(r.sqnr, 0.0), longest) for r in rows]  # exact layers as long as the best of the others
    axes.barh(range(len(rows)), lengths, height=0.72, color=[_WEAK if i in weak else _BAR for i in range(len(rows))])
    for i, report in enumerate(rows):
        axes.text(lengths[i] + longest * 0.01, i, _sqnr_text(report), va="center", ha="left", fontsize=7.5, color=_INK)
    axes.set_yticks(range(len(rows)), [_plain(r.name, 44) for r in rows])
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    _clean(axes, "x")
    axes.tick_params(axis="y", colors=_INK, labelsize=7.5)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, longest * 1.1)
    note = "; the weakest three stand out" if weak else ""
    axes.set_title(f"SQNR of the weights, dB (6 dB is one bit{note})", loc="left", fontsize=10, color=_INK)


def _draw_strips(axes: Axes, rows: Sequence[LayerReport]) -> None:
    """Draw a row of shades a layer: the square root of its codes' counts, each row against its own maximum."""
    same = len({r.codes for r in rows}) == 1
    width = len(rows[0].codes) if same else 64
    shades = np.zeros((len(rows), width))
    for i, report in enumerate(rows):
        counts = np.asarray(report.histogram, np.float64)
        if not same:  # codes of different formats: their place between the lowest and the highest
            place = np.arange(len(counts)) * width // len(counts)
            counts = np.bincount(place, counts, width) / np.maximum(np.bincount(place, minlength=width), 1)
        shades[i] = np.sqrt(counts / max(counts.max(), 1.0))
    axes.imshow(
        shades, aspect="auto", cmap="Blues", vmin=0.0, vmax=1.05, interpolation="nearest",
        extent=(-0.5, width - 0.5, len(rows) - 0.5, -0.5),
    )  # fmt: skip
    axes.hlines(np.arange(1, len(rows)) - 0.5, -0.5, width - 0.5, color="white", linewidth=1.2)
    _clean(axes)
    axes.tick_params(axis="y", labelleft=False)
    if same:
        _label_codes(axes, rows[0])
    else:
        axes.set_xticks([0, width - 1], ["lowest code", "highest code"])
    what = "Decoded codes" if rows[0].config.info.is_float else "Codes"
    axes.set_title(f"{what} in use (darker: more often)", loc="left", fontsize=10, color=_INK)


def _label_codes(axes: Axes, report: LayerReport) -> None:
    """Put codes (all, or a handful of many) under positions 0, 1, 2 ..."""
    count = len(report.codes)
    places = range(count) if count <= 16 else sorted({i * (count - 1) // 4 for i in range(5)})
    axes.set_xticks(places, [f"{report.codes[i]:g}" for i in places])


def _draw_histogram(axes: Axes, report: LayerReport, which: str) -> None:
    counts: NDArray[np.float64] = np.asarray(report.histogram, np.float64)
    share = 100 * counts / max(counts.sum(), 1.0)
    colour = _WEAK if which == "weakest" else _BAR
    if len(share) > 32:
        axes.stairs(share, np.arange(len(share) + 1) - 0.5, fill=True, color=colour, linewidth=0)
    else:
        axes.bar(range(len(share)), share, width=0.86, color=colour, linewidth=0)
    _clean(axes, "y")
    _label_codes(axes, report)
    axes.margins(x=0.01)
    axes.set_title(f"{which}: {_plain(report.name, 44)}", loc="left", fontsize=9, color=_INK, parse_math=False)
    unit = " dB" if math.isfinite(report.sqnr) else ""
    note = f"{_sqnr_text(report)}{unit}, {report.bits_per_weight:.2f} bits a weight, entropy {report.entropy:.2f} bits"
    axes.set_xlabel(note, fontsize=8, color=_QUIET, loc="left")
    axes.set_ylabel("% of the weights", fontsize=8, color=_QUIET)
