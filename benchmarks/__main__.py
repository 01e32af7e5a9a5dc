"""`python -m benchmarks [--short] [--json FILE] [--picture FILE] [SUITE ...]`: exits 1 only when a result is wrong."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import peers, suites
from benchmarks.suites import SUITES, Table
from benchmarks.targets import Verdict, label
from qnative import bench
from qnative.bench import OURS, Outcome
from qnative.report import table

#: Kinds of contenders that are columns of their own beside the layer's.
PEERS = ("dynamic", "integer", "static", "float32")


def main(argv: list[str] | None = None) -> int:
    """Run the suites, print their tables and the targets, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Check, then time, in turns.")
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)} (default: all)")
    parser.add_argument("--short", action="store_true", help="fewer shapes, shorter timing")
    parser.add_argument("--json", metavar="FILE", help="write every figure to FILE ('-': to standard output)")
    parser.add_argument("--picture", metavar="FILE", help="draw the figures (.png, .svg, .pdf)")
    options = parser.parse_args(argv)
    unknown = sorted(set(options.suites) - set(SUITES))
    if unknown:
        parser.error(f"unknown suite {unknown[0]!r}; choose from {', '.join(SUITES)}")

    # With --json - standard output holds JSON alone.
    out = sys.stderr if options.json == "-" else sys.stdout
    about = bench.machine() | {"versions": peers.versions()}
    about["threads"] = suites.several()
    about["cpus_obtained"] = bench.cpus_obtained(min(about["cpus_available"], 2))
    print(heading(about), file=out, flush=True)
    found: list[tuple[str, Table]] = []
    try:
        for name in options.suites or SUITES:
            for part in SUITES[name](options.short):
                print(f"\n{render(f'{name}, {part.title}', part)}", file=out, flush=True)
                found.append((name, part))
    except bench.WrongResult as error:
        print(f"wrong result: {error}", file=sys.stderr)
        return 1
    verdicts = [verdict for _, part in found for verdict in part.verdicts]
    if verdicts:
        print(f"\n{summary(verdicts)}", file=out)
    document = to_json(about, options.short, found)
    if options.json == "-":
        print(json.dumps(document, indent=1))
    elif options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1)
            file.write("\n")
    if options.picture:
        from benchmarks import picture

        picture.draw(document, options.picture)
        print(f"\npicture: {options.picture}", file=out)
    return 0


def heading(about: dict[str, Any]) -> str:
    """Return what figures depend on, in a few lines."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items()) or "no peers installed"
    caches = ", ".join(f"{level} {size >> 10} KiB" for level, size in about["caches"].items())
    wanted, obtained = min(about["cpus_available"], 2), about["cpus_obtained"]
    return (
        f"{about['cpu']}, {about['cpus_available']} cores, {caches}\n"
        f"qnative's kernel {about['kernel']}; NumPy {about['numpy']} with {about['blas'] or 'an unknown BLAS'}\n"
        f"{versions}\n"
        "Medians of turns in one run. One thread: CPU time. Several: time on the wall.\n"
        f"Layers on at most {about['threads']} threads; {wanted} busy ones got {obtained:.2f} CPUs' time just now"
        + (": others are running here" if obtained < 0.9 * wanted else "")
    )


def render(title: str, part: Table) -> str:
    """Return outcomes as a table: a line a case where qnative is in all of them, else a line a contender."""
    if all(OURS in outcome.timings for outcome in part.outcomes):
        return table(wide_rows(title, part.outcomes))
    return table(long_rows(title, part))


def wide_rows(title: str, outcomes: Sequence[Outcome]) -> Iterator[dict[str, Any]]:
    """Return our time, then rates in GOPS: ours, the limits', the peers'."""
    names = list(dict.fromkeys(n for outcome in outcomes for n in outcome.names(*PEERS)))
    kinds = [kind for kind in ("limit", "read", "plain read") if any(o.best(kind) for o in outcomes)]
    for outcome in outcomes:
        row = {
            title: outcome.case.name,
            "us": outcome.seconds(OURS) * 1e6,
            "+- %": 100 * outcome.timings[OURS].spread,
            OURS: outcome.rate(OURS) / 1e9,
        }
        for kind in kinds:
            best = outcome.best(kind)
            row[kind] = outcome.rate(best) / 1e9 if best else None
            row[f"% of {kind}"] = 100 * outcome.ratio(OURS, best) if best else None
        yield row | {name: outcome.rate(name) / 1e9 if name in outcome.timings else None for name in names}


def long_rows(title: str, part: Table) -> Iterator[dict[str, Any]]:
    """Return a line a contender."""
    for outcome in part.outcomes:
        for contender in outcome.case.contenders:
            timing = outcome.timings[contender.name]
            rate = {part.unit: outcome.rate(contender.name) / 1e9} if part.unit else {}
            yield {
                title: label(outcome),
                "contender": contender.name,
                "us": timing.median * 1e6,
                "+- %": 100 * timing.spread,
            } | rate


def summary(verdicts: Sequence[Verdict]) -> str:
    """Return the targets as a table, and how many are met."""
    met = sum(verdict.met for verdict in verdicts)
    return f"{table([verdict.row() for verdict in verdicts])}\n\n{met} of {len(verdicts)} met"


def to_json(about: dict[str, Any], short: bool, found: Sequence[tuple[str, Table]]) -> dict[str, Any]:
    """Return everything that was measured and asked."""
    return {
        "machine": about,
        "short": short,
        "results": [
            {"suite": name, "title": part.title, "unit": part.unit, "cases": [o.to_dict() for o in part.outcomes]}
            for name, part in found
        ],
        "targets": [verdict.to_dict() for _, part in found for verdict in part.verdicts],
    }


def without_overrides() -> None:
    """Start again without what the environment forces on OpenBLAS, which NumPy's product would be measured with."""
    forced = [name for name in bench.BLAS_OVERRIDES if name in os.environ]
    if forced:
        print(f"unset, since it forces kernels on OpenBLAS: {', '.join(forced)}", file=sys.stderr, flush=True)
        environment = {name: value for name, value in os.environ.items() if name not in forced}
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks", *sys.argv[1:]], environment)


if __name__ == "__main__":
    without_overrides()
    sys.exit(main())
