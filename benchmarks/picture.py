"""The picture of a run: speed over the number of rows under the machine's roof, the table's rows, the targets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qnative.bench import OURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Colour and line of each contender; integer products, which are less than a layer, are dashed.
LOOKS: dict[str, tuple[str, str]] = {
    OURS: ("#c1272d", "-"),
    "ONNX Runtime dynamic": ("#0b61a4", "-"),
    "PyTorch dynamic": ("#e08a00", "-"),
    "ONNX Runtime integer": ("#0b61a4", "--"),
    "NumKong integer": ("#5b8c3e", "--"),
    "NumPy float32": ("#777777", ":"),
}

Document = dict[str, Any]


def draw(document: Document, path: str) -> None:
    """Draw a run's figures, as `benchmarks.__main__.to_json` has them, into a file.

    Raises
    ------
    ImportError
        Without matplotlib.
    ValueError
        If no suite that the picture shows was run, or the file's ending is not one that matplotlib knows.
    """
    from matplotlib.figure import Figure

    panels = [panel for panel, has in PANELS if has(document)]
    if not panels:
        raise ValueError("nothing to draw: the picture shows the suites rows and int8, and the targets")
    figure = Figure(figsize=(6.0 * len(panels), 5.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for panel, ax in zip(panels, axes, strict=True):
        panel(ax, document)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    about = document["machine"]
    figure.suptitle(
        f"qnative, kernel {about['kernel']}, on {about['cpu']}: medians of one run, contenders by turns", fontsize=12
    )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def cases(document: Document, suite: str, threads: int = 1) -> list[dict[str, Any]]:
    """Return a suite's cases of layers on so many threads."""
    return [
        case
        for result in document["results"]
        if result["suite"] == suite
        for case in result["cases"]
        if case["shape"] and case["threads"] == threads
    ]


def fastest(case: dict[str, Any], kind: str) -> float | None:
    """Return the best rate of a kind in GOPS."""
    return max((c["gops"] for c in case["contenders"].values() if c["kind"] == kind), default=None)


def roof(case: dict[str, Any]) -> float | None:
    """Return the rate that a case cannot exceed in GOPS: that of multiply-adds or, of one row, of reading weights."""
    limits = [rate for rate in (fastest(case, "limit"), fastest(case, "read")) if rate]
    return min(limits, default=None)


def over_rows(ax: Axes, document: Document) -> None:
    """Draw rates over M, under the roof of bandwidth and multiply-adds."""
    found = cases(document, "rows")
    rows = [case["shape"][0] for case in found]
    _, k, n = found[0]["shape"]
    limit = max(fastest(case, "limit") or 0.0 for case in found)
    read = fastest(found[0], "read") or limit  # a rate at one row; more rows read the same weights
    roof_rows = np.geomspace(rows[0], rows[-1], 400)
    ax.plot(roof_rows, np.minimum(limit, read * roof_rows / rows[0]), color="black", linewidth=1.2)
    ax.text(
        rows[-1], 1.01 * limit, "limit: reading the weights, then multiply-adds", ha="right", va="bottom", fontsize=9
    )
    for name, (colour, line) in LOOKS.items():
        points = [(m, case["contenders"][name]["gops"]) for m, case in zip(rows, found, strict=True)
                  if name in case["contenders"]]  # fmt: skip
        if points:
            ours = name == OURS
            ax.plot(
                *zip(*points, strict=True), line, color=colour, label=name, marker="o" if ours else None,
                linewidth=2.4 if ours else 1.4, zorder=3 if ours else 2,
            )  # fmt: skip
    ax.set_xscale("log", base=2)
    ax.set_xticks(rows, [str(m) for m in rows])
    ax.set_ylim(0, 1.08 * limit)
    ax.set_xlabel("rows in a call")
    ax.set_ylabel("GOPS, one thread")
    ax.set_title(f"A layer of {k} inputs and {n} outputs, int8", fontsize=11)


def of_table(ax: Axes, document: Document) -> None:
    """Draw each row of the table as shares of its roof."""
    found = [case for case in cases(document, "int8") if roof(case)]
    names = [case["name"].replace(",", " x ") for case in found]
    for name, (colour, line) in LOOKS.items():
        points = [
            (case["contenders"][name]["gops"] / (roof(case) or 1.0), -i)
            for i, case in enumerate(found)
            if name in case["contenders"]
        ]
        if points:
            ours = name == OURS
            ax.scatter(
                [share for share, _ in points], [i for _, i in points], label=name,
                s=70 if ours else 32, zorder=3 if ours else 2,
                marker="o" if line == "-" else "D" if line == "--" else "x",
                facecolors=colour if line in ("-", ":") else "none", edgecolors=None if line == ":" else colour,
            )  # fmt: skip
    for i in range(len(found)):
        ax.axhline(-i, color="#dddddd", linewidth=0.8, zorder=0)
    ax.axvline(1, color="black", linewidth=1)
    ax.set_yticks([-i for i in range(len(names))], names)
    ax.set_xlim(0, 1.04)
    ax.set_xlabel("share of the limit, one thread (M = 1: of reading the weights)")
    ax.set_title("int8 layers, M x K x N", fontsize=11)


def of_targets(ax: Axes, document: Document) -> None:
    """Draw every target's ratio to what is wanted."""
    names = sorted({t["target"] for t in document["targets"]}, key=lambda name: int(name[1:]))
    for target in document["targets"]:
        i = names.index(target["target"])
        ratio = min(max(target["ratio"], 1 / 4), 4)
        colour = "#3a7d44" if target["met"] else "none"
        ax.scatter(ratio, -i, s=44, facecolors=colour, edgecolors="#222222", linewidths=1.0, alpha=0.8, zorder=2)
    for i, _ in enumerate(names):
        ax.axhline(-i, color="#dddddd", linewidth=0.8, zorder=0)
    ax.axvline(1, color="black", linewidth=1)
    ax.set_xscale("log", base=2)
    ticks = [0.25, 0.5, 0.8, 1, 1.25, 2, 4]
    ax.set_xticks(ticks, ["<= 1/4", "1/2", "0.8", "1", "1.25", "2", ">= 4"])
    ax.minorticks_off()
    met = sum(t["met"] for t in document["targets"])
    counts = [
        (sum(t["met"] for t in document["targets"] if t["target"] == n),
         sum(t["target"] == n for t in document["targets"]))
        for n in names
    ]  # fmt: skip
    ax.set_yticks([-i for i in range(len(names))], [f"{n}  {a}/{b}" for n, (a, b) in zip(names, counts, strict=True)])
    ax.set_xlabel("seen / wanted, or wanted / seen where less is better (filled: met)")
    ax.set_title(f"Targets: {met} of {len(document['targets'])} met", fontsize=11)


def _panels() -> Iterator[tuple[Any, Any]]:
    yield over_rows, lambda document: cases(document, "rows")
    yield of_table, lambda document: any(roof(case) for case in cases(document, "int8"))
    yield of_targets, lambda document: document["targets"]


#: What to draw, and whether a run has it.
PANELS = tuple(_panels())
