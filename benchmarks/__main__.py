"""`python -m benchmarks [--short] [--json FILE] [SUITE ...]`: exits 1 only when a result is wrong."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from benchmarks import linear, peers, targets, threads
from qnative import bench
from qnative.bench import OURS, Outcome
from qnative.report import table


def main(argv: list[str] | None = None) -> int:
    """Run the suites, print their tables, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Check, then time, in turns.")
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)} (default: all)")
    parser.add_argument("--short", action="store_true", help="fewer shapes, shorter timing")
    parser.add_argument("--json", metavar="FILE", help="write every figure to FILE ('-': to standard output)")
    options = parser.parse_args(argv)
    unknown = sorted(set(options.suites) - set(SUITES))
    if unknown:
        parser.error(f"unknown suite {unknown[0]!r}; choose from {', '.join(SUITES)}")

    # With --json - standard output holds JSON alone.
    tables = sys.stderr if options.json == "-" else sys.stdout
    about = bench.machine() | {"threads": threads.available(), "versions": peers.versions()}
    print(heading(about), file=tables)
    results: list[dict[str, Any]] = []
    verdicts: list[targets.Verdict] = []
    try:
        with bench.blas_threads(1):
            for name in options.suites or SUITES:
                for title, outcomes, found in SUITES[name](options.short):
                    print(f"\n{render(title, outcomes)}", file=tables, flush=True)
                    results.append({"suite": name, "title": title, "cases": [o.to_dict() for o in outcomes]})
                    verdicts += found
    except bench.WrongResult as error:
        print(f"wrong result: {error}", file=sys.stderr)
        return 1
    if verdicts:
        print(f"\n{table([verdict.row() for verdict in verdicts])}", file=tables)
    if options.json:
        document = {"machine": about, "results": results, "targets": [verdict.to_dict() for verdict in verdicts]}
        text = json.dumps(document, indent=1)
        if options.json == "-":
            print(text)
        else:
            with open(options.json, "w", encoding="utf-8") as file:
                file.write(text + "\n")
    return 0


def heading(about: dict[str, Any]) -> str:
    """Return what figures depend on, in a few lines."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return (
        f"{about['cpu']}, {about['cpus_available']} cores, kernel {about['kernel']}, {about['threads']} threads\n"
        f"Python {about['python']}, NumPy {about['numpy']} ({about['blas']}), {versions}"
    )


Found = tuple[str, list[Outcome], list[targets.Verdict]]


def int8(short: bool) -> Iterator[Found]:
    """The table of the int8 layer."""
    seconds = 0.3 if short else 2.0
    outcomes = [
        bench.race(linear.int8_case(shape), seconds) for shape in (linear.SHORT_SHAPES if short else linear.SHAPES)
    ]
    yield "int8, one thread", outcomes, [*targets.peers(outcomes), *targets.compute(outcomes)]


def others(short: bool) -> Iterator[Found]:
    """int4 and fp8."""
    for title, cases in linear.others(short):
        yield title, [bench.race(case, 0.3 if short else 1.5) for case in cases], []


#: Kinds that are columns of their own.
PEERS = ("dynamic", "integer", "static", "float32")
SUITES: dict[str, Callable[[bool], Iterator[Found]]] = {"int8": int8, "others": others}


def render(title: str, outcomes: Sequence[Outcome]) -> str:
    """Return outcomes as a table: our time, everyone's rate in GOPS, our share of the limit."""
    names = list(dict.fromkeys(n for outcome in outcomes for n in outcome.names(*PEERS)))
    rows = []
    for outcome in outcomes:
        ours, limit, read = outcome.timings[OURS], outcome.best("limit"), outcome.best("read")
        rows.append(
            {
                title: outcome.name,
                "us": ours.median * 1e6,
                "+- %": 100 * ours.spread,
                OURS: outcome.rate(OURS) / 1e9,
                "limit": outcome.rate(limit) / 1e9 if limit else None,
                "%": 100 * outcome.ratio(OURS, limit) if limit else None,
                "read": outcome.rate(read) / 1e9 if read else None,
                "% read": 100 * outcome.ratio(OURS, read) if read else None,
                **{n: outcome.rate(n) / 1e9 if n in outcome.timings else None for n in names},
            }
        )
    return table(rows)


if __name__ == "__main__":
    sys.exit(main())
