"""`python -m benchmarks [--short] [--json FILE] [SUITE ...]`: exits 1 only when a result is wrong."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import fake_quant, harness, linear

SUITES: dict[str, Callable[[bool], Iterator[harness.Suite]]] = {
    "linear": linear.suites,
    "fake_quant": fake_quant.suites,
}


def main(argv: list[str] | None = None) -> int:
    """Run the suites, print their tables, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Check, then time; one thread.")
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)} (default: all)")
    parser.add_argument("--short", action="store_true", help="fewer shapes, shorter timing")
    parser.add_argument("--json", metavar="FILE", help="write every figure to FILE ('-': to standard output)")
    options = parser.parse_args(argv)
    unknown = sorted(set(options.suites) - set(SUITES))
    if unknown:
        parser.error(f"unknown suite {unknown[0]!r}; choose from {', '.join(SUITES)}")

    # With --json - standard output holds JSON alone.
    tables = sys.stderr if options.json == "-" else sys.stdout
    about = harness.machine()
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    print(f"{about['cpu']}, {about['cores']} cores, kernels: {about['isa']}, one thread", file=tables)
    print(f"Python {about['python']}, {versions}", file=tables)
    print("x NAME: how many times NAME's speed ours is, medians of one run", file=tables)

    results: list[dict[str, Any]] = []
    try:
        with harness.one_thread():
            for name in options.suites or SUITES:
                for suite in SUITES[name](options.short):
                    outcomes = list(harness.run(suite, seconds=0.3 if options.short else 1.5))
                    print(f"\n{harness.report(suite.title, outcomes)}", file=tables, flush=True)
                    results.append({"suite": name, "title": suite.title, "cases": [o.to_dict() for o in outcomes]})
    except harness.WrongResult as error:
        print(f"wrong result: {error}", file=sys.stderr)
        return 1
    if options.json:
        text = json.dumps({"machine": about, "results": results}, indent=1)
        if options.json == "-":
            print(text)
        else:
            with open(options.json, "w", encoding="utf-8") as file:
                file.write(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
