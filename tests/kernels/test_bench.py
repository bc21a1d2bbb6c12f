"""The bench refuses what is red, says who is absent, and its page says what its record says."""

import json
import time
from pathlib import Path

import pytest
import torch

from megagrok.errors import KernelError
from megagrok.kernels import bench
from megagrok.kernels.bench_cases import CPU_LAYERS, OPS, Field, attention_field, entropy_field, fields, needs
from megagrok.kernels.bench_page import render
from megagrok.kernels.choice import IMPLEMENTATIONS
from megagrok.kernels.roofline import Roofline, measure_roofline
from megagrok.kernels.timing import Case
from megagrok.platform import CPU

ROOF = Roofline(flops_per_second=1e9, bytes_per_second=1e8)


def _nap(seconds: float):  # type: ignore[no-untyped-def]
    return lambda: lambda: time.sleep(seconds)


def _fail() -> None:
    raise KernelError("needs a multiple of 16")


def _record(**changes: object) -> dict:  # type: ignore[type-arg]
    case = Case(
        "norm",
        "8 rows",
        1e6,
        0.0,
        {"torch": _nap(0.002), "Other": _nap(0.004), "plain matmuls": _nap(0.001), "triton": _fail},
    )
    written = bench.time_field(Field(case, {"Third": "not installed: third"}), CPU, ROOF)
    record = bench.describe_machine(CPU) | {"roofline": {"flops_per_second": 1e9, "bytes_per_second": 1e8}}
    return record | {"cases": [written], "refused": {"attention": "it has no tests"}, "seconds": 3} | changes


def test_names_tell_ours_from_peers_and_floors() -> None:
    kinds = {
        name: bench.kind(name) for name in ("torch", "megagrok", "megagrok, triton experts", "plain matmuls", "Liger")
    }
    assert list(kinds.values()) == ["ours", "ours", "ours", "floor", "peer"]


def test_a_row_says_how_fast_beside_the_best_peer_and_beside_the_machine() -> None:
    (case,) = _record()["cases"]
    rows = {row["name"]: row for row in case["rows"]}
    assert case["best_peer"] == "Other"
    assert rows["torch"]["times_as_fast_as_best_peer"] == pytest.approx(2, rel=0.3)
    # 1e6 FLOPs at 1e9 a second last 1 ms.
    assert rows["torch"]["share_of_roofline"] == pytest.approx(0.5, rel=0.3)


def test_the_page_shows_every_row_and_every_absence() -> None:
    record = json.loads(json.dumps(_record()))
    page = render(record)
    for words in (
        "**torch**", "Other", "*plain matmuls*", "Third: not installed: third.", "attention: it has no tests",
        "**triton failed**: KernelError: needs a multiple of 16.", record["commit"], "x as fast as Other",
    ):  # fmt: skip
        assert words in page


def test_the_roofline_takes_the_slower_of_flops_and_bytes() -> None:
    assert ROOF.seconds(Case("a", "", 1e9, 1e9, {})) == 10.0
    assert ROOF.seconds(Case("a", "", 1e9, 1e7, {})) == 1.0


def test_the_roofline_of_this_machine_is_a_rate() -> None:
    roofline = measure_roofline(CPU, copied_bytes=1 << 22, seconds=0.05)
    assert 1e8 < roofline.flops_per_second < 1e14
    assert 1e8 < roofline.bytes_per_second < 1e13


def test_a_red_operation_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "kernels" / "norm"
    folder.mkdir(parents=True)
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    assert bench.why_red("norm", CPU) == "it has no tests"
    test = folder / "test_norm.py"
    test.write_text("def test_that_holds(): pass\n", encoding="utf-8")
    assert bench.why_red("norm", CPU) is None
    test.write_text("def test_that_fails(): assert 1 == 2\n", encoding="utf-8")
    assert "test_that_fails" in (bench.why_red("norm", CPU) or "")
    out = tmp_path / "out.json"
    assert bench.main(["--ops", "norm", "--threads", "1", "--json", str(out)]) == 1
    record = json.loads(out.read_text(encoding="utf-8"))
    assert record["cases"] == []
    assert "test_that_fails" in record["refused"]["norm"]


def test_the_layer_waits_for_the_tests_of_what_it_is_made_of() -> None:
    assert needs("layer") == ("router", "experts")
    assert ("layer", *IMPLEMENTATIONS) == OPS


def test_the_layer_is_raced_on_few_wide_many_narrow_skewed_and_large_experts() -> None:
    found = fields("layer", CPU.device)
    assert [field.case.shape for field in found] == [shape.in_words() for shape in CPU_LAYERS]
    assert all({"megagrok", "plain matmuls", "HF Mixtral"} < set(field.case.makes) for field in found)
    assert all("SonicMoE" in field.absent for field in found)


def test_the_cases_of_a_gpu_run_on_what_is_there() -> None:
    for field in (attention_field(32, 64, 30.0, CPU.device), entropy_field(16, 32, 64, CPU.device)):
        field.case.makes["torch"]()()
        assert field.case.flops > 0
    without_cap = attention_field(32, 64, None, CPU.device).case
    without_cap.makes["torch"]()()
    without_cap.makes["torch sdpa"]()()
    assert "torch sdpa" in attention_field(32, 64, 30.0, CPU.device).absent


def test_peers_of_attention_mix_as_ours_does() -> None:
    from megagrok.kernels.attention import choose_attention
    from megagrok.kernels.peers import ATTENTIONS

    q, k, v = (torch.randn(1, heads, 8, 16) for heads in (4, 2, 2))
    theirs = ATTENTIONS["torch sdpa"].make(q, k, v, None)
    ours = choose_attention("torch", CPU.device)(*(tensor.permute(2, 0, 1, 3) for tensor in (q, k, v)), cap=None)
    assert torch.allclose(theirs.permute(2, 0, 1, 3).flatten(2), ours, atol=1e-5)
