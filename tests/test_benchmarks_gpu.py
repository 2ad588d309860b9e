"""`python -m benchmarks.gpu` on tiny shapes: every loss that is installed is measured, and the others say why not."""

import json

import pytest
import torch

from benchmarks import gpu, gpu_losses, inputs
from xhead.engines import triton as engine

pytest.importorskip("triton")
SMOKE = ["--smoke", "--peers", "stock", "xhead", "cut_cross_entropy", "liger", "quack", "torch"]


def test_smoke(tmp_path, capsys):
    check = tmp_path / "test_nothing.py"
    check.write_text("def test_nothing():\n    pass\n")
    constants = engine.DENSE_SHARE, engine.FUSED_FORWARD
    record = gpu.main([*SMOKE, "--tests", str(check), "--output", str(tmp_path / "gpu.json")])
    assert constants == (engine.DENSE_SHARE, engine.FUSED_FORWARD)
    assert record["tests"]["passed"], record["tests"]
    assert json.loads((tmp_path / "gpu.json").read_text()) == record
    assert record["environment"]["torch"] == torch.__version__
    assert [case["kind"] for case in record["cases"]] == ["random initialisation", "like trained, 61 entries a row"]
    for case in record["cases"]:
        found = {result["name"]: result for result in case["results"]}
        reference = found[gpu_losses.STOCK]
        for name in ("xhead", "xhead, filter off", "xhead, filter never aside", "xhead, filter off, forward in slices"):
            assert found[name]["both"] > 0
            assert found[name]["loss"] == pytest.approx(reference["loss"], rel=0.02)
            assert found[name]["hidden_error"] < 0.02
            assert found[name]["weight_error"] < 0.02
        assert "active_share" not in found["xhead, filter off"]
        assert 0 < found["xhead"]["active_share"] <= 1
    printed = capsys.readouterr().out
    assert "xhead, filter never aside" in printed
    assert "active tiles" in printed


def test_what_is_not_there_or_fails_is_said(monkeypatch):
    def missing():
        raise gpu_losses.NotInstalled("some-kernels")

    def failing():
        return lambda hidden, weight, target: (_ for _ in ()).throw(RuntimeError("no such kernel\nmore"))

    def training_only():
        def loss(hidden, weight, target):
            if not torch.is_grad_enabled():
                raise ValueError("only with a gradient")
            return torch.nn.functional.cross_entropy(hidden @ weight.T, target)

        return loss

    losses = {"missing": missing, "failing": failing, "training only": training_only}
    candidates = [gpu_losses.Candidate(name, make) for name, make in losses.items()]
    device = torch.device("cpu")
    shape = gpu.Shape(20, 60, 8)
    make = gpu.kinds(shape)["random initialisation"]
    case = gpu.measure_case(shape, make, candidates, device, gpu.Clock(60.0))
    whys = [found["why"] for found in case["results"][:2]]
    assert whys == ["not installed: some-kernels", "RuntimeError: no such kernel"]
    assert case["results"][2]["forward_why"] == "ValueError: only with a gradient"
    assert case["results"][2]["both"] > 0
    assert "not installed: some-kernels" in gpu.table(case)
    late = gpu.measure_case(shape, make, candidates, device, gpu.Clock(0.0))
    assert {found["why"] for found in late["results"]} == {"no time left"}


def test_tests_that_do_not_end_are_said_to(tmp_path):
    (tmp_path / "test_slow.py").write_text("import time\ndef test_slow():\n    time.sleep(60)\n")
    assert gpu.run_tests([str(tmp_path / "test_slow.py")], 1.0)["passed"] is None


def test_the_truth_is_that_of_autograd():
    made = inputs.random_initialisation(200, 700, 16)
    truth = gpu.exact(made, block=64)
    hidden, weight = made.hidden.double().requires_grad_(), made.weight.double().requires_grad_()
    torch.nn.functional.cross_entropy(hidden @ weight.T, made.target).backward()
    torch.testing.assert_close(truth.hidden_grad, hidden.grad[truth.row], rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(truth.weight_grad, weight.grad[truth.classes], rtol=1e-5, atol=1e-9)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="needs a GPU.*--smoke"):
        gpu.main(["--tests"])
