"""`python -m benchmarks.gpu` on tiny shapes: every loss that is installed is measured, and the others say why not."""

import json
import sys
import types

import pytest
import torch

from benchmarks import gpu, gpu_losses, gpu_verdicts, inputs
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
    assert torch.__version__.startswith(record["environment"]["torch"])  # the metadata may lack "+cu130"
    assert [case["kind"] for case in record["cases"]] == ["random initialisation", "like trained, 61 entries a row"]
    for case in record["cases"]:
        found = {result["name"]: result for result in case["results"]}
        reference = found[gpu_losses.STOCK]
        for name in ("xhead", "xhead, filter off", "xhead, all active tiles", "xhead, filter off, forward in slices"):
            assert found[name]["both"] > 0
            assert found[name]["loss"] == pytest.approx(reference["loss"], rel=0.02)
            assert found[name]["hidden_error"] < 0.02
            assert found[name]["weight_error"] < 0.02
        assert "active_share" not in found["xhead, filter off"]
        assert 0 < found["xhead"]["active_share"] <= 1
    printed = capsys.readouterr().out
    assert "xhead, all active tiles" in printed
    assert "active tiles" in printed
    assert [len(record["training"][name]) for name in ("stock", "xhead")] == [2, 2]
    assert record["training"]["apart"] < 0.01
    assert {goal["met"] for goal in record["goals"] if goal["what"].startswith("gemma")} == {None}
    assert "xhead/engines/triton.py should have DENSE_SHARE = " in printed


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
    case = {}
    gpu.measure_case(case, shape, make, candidates, device, gpu.Clock(60.0))
    whys = [found["why"] for found in case["results"][:2]]
    assert whys == ["not installed: some-kernels", "RuntimeError: no such kernel"]
    assert case["results"][2]["forward_why"] == "ValueError: only with a gradient"
    assert case["results"][2]["both"] > 0
    assert "not installed: some-kernels" in gpu.table(case)
    late = {}
    gpu.measure_case(late, shape, make, candidates, device, gpu.Clock(0.0))
    assert {found["why"] for found in late["results"]} == {"no time left"}


def test_tests_that_do_not_end_are_said_to(tmp_path):
    (tmp_path / "test_slow.py").write_text("import time\ndef test_slow():\n    time.sleep(60)\n")
    assert gpu.run_tests([str(tmp_path / "test_slow.py")], 1.0)["passed"] is None


def test_tests_that_fail_are_named(tmp_path):
    (tmp_path / "test_one.py").write_text("def test_wrong():\n    assert False\ndef test_right():\n    pass\n")
    found = gpu.run_tests([str(tmp_path / "test_one.py")], 120.0)
    assert found["passed"] is False
    assert [name.split("::")[1] for name in found["failures"]] == ["test_wrong"]
    assert "1 failed, 1 passed" in found["said"]


def test_what_loses_the_gpu_costs_the_others_nothing(tmp_path, monkeypatch):
    """The command starts again, and goes on behind the loss that failed."""
    lost, starts = [], []

    def losing():
        lost.append(1)
        raise RuntimeError("an illegal memory access was encountered")

    def again(arguments, seconds):
        starts.append(arguments)
        lost.clear()
        raise SystemExit(gpu.main([*arguments, "--resume", "--tests"]))

    losses = (*gpu_losses.GROUPS["stock"], gpu_losses.Candidate("losing", losing))
    after = gpu_losses.Candidate("after", gpu_losses.GROUPS["stock"][0].make)
    monkeypatch.setitem(gpu_losses.GROUPS, "stock", (*losses, after))
    monkeypatch.setattr(gpu, "usable", lambda device: not lost)
    monkeypatch.setattr(gpu, "start_again", again)
    monkeypatch.setattr(gpu.gpu_training, "compare", lambda *_, **__: {"apart": 0.0})
    output = tmp_path / "gpu.json"
    with pytest.raises(SystemExit):
        gpu.main(["--smoke", "--peers", "stock", "--tests", "--output", str(output)])
    record = json.loads(output.read_text())
    assert len(starts) == len(record["cases"]) == 2
    for case in record["cases"]:
        found = {result["name"]: result for result in case["results"]}
        assert list(found) == [gpu_losses.STOCK, "losing", "after"]
        assert found["losing"]["why"] == "RuntimeError: an illegal memory access was encountered"
        assert found["after"]["both"] > 0


def test_inputs_that_cannot_be_made_cost_the_others_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.inputs, "trained_like", lambda *_, **__: [][0])
    monkeypatch.setattr(gpu.gpu_training, "compare", lambda *_, **__: {}["no such text"])
    output = tmp_path / "gpu.json"
    record = gpu.main(["--smoke", "--peers", "stock", "--tests", "--output", str(output)])
    assert "both" in record["cases"][0]["results"][0]
    assert record["cases"][1]["why"] == "IndexError: list index out of range"
    assert record["training"]["why"] == "KeyError: 'no such text'"


def test_the_truth_is_that_of_autograd():
    made = inputs.random_initialisation(200, 700, 16)
    truth = gpu.exact(made, block=64)
    hidden, weight = made.hidden.double().requires_grad_(), made.weight.double().requires_grad_()
    torch.nn.functional.cross_entropy(hidden @ weight.T, made.target).backward()
    torch.testing.assert_close(truth.hidden_grad, hidden.grad[truth.row], rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(truth.weight_grad, weight.grad[truth.classes], rtol=1e-5, atol=1e-9)


def result(name, both, share=None, error=0.01, **others):
    record = {"name": name, "both": both, "hidden_error": error, "weight_error": error} | others
    return record if share is None else record | {"active_share": share}


def test_goals_and_constants_follow_from_what_was_measured():
    """Of made-up times: 10 ms and 100 ms a share of tiles, dense 40 ms, so that both take as long at 30 %."""
    results = [
        result(gpu_losses.STOCK, 0.1, error=0.02),
        result("xhead", 0.02, 0.1),
        result("xhead, all active tiles", 0.05, 0.4, error=0.001, beyond_gradients=60e6),
        result("xhead, all active tiles, 2^-8", 0.02, 0.1, error=0.009, beyond_gradients=62e6),
        result("xhead, dropped", 0.045, 0.4, error=0.03),
        result("xhead, filter off", 0.04, forward=0.014, beyond_gradients=600e6),
        result("xhead, filter off, forward in slices", 0.045, forward=0.016),
        result("cut_cross_entropy", 0.02, error=0.024),
        result("Liger fused linear", 0.01),
        {"name": "QuACK chunked linear", "why": "not installed"},
    ]
    cases = [{"case": name, "kind": "made up", "results": results} for name in ("gemma", "qwen")]
    record = {"cases": [*cases, {"case": "llama2", "kind": "made up", "why": "out of memory"}]}
    assert gpu_verdicts.suggested(record) == {"DENSE_SHARE": 0.3, "FUSED_FORWARD": True}
    goals = {goal["what"]: goal for goal in gpu_verdicts.goals(record)}
    assert goals["gemma, both, 20% of the tiles"]["measured"] == pytest.approx(0.03)
    assert goals["gemma, both, 10% of the tiles"]["met"]
    assert goals["gemma, both, dense"]["met"]
    assert goals["gemma, forward, dense"]["met"]
    assert goals["gemma, beyond_gradients, 20% of the tiles"]["met"]
    assert not goals["gemma, beyond_gradients, dense"]["met"]
    assert goals["llama3, both, dense"]["met"] is None
    assert goals["qwen, made up, faster than cut_cross_entropy"]["met"]
    assert not goals["qwen, made up, faster than Liger fused linear"]["met"]
    assert goals["gemma, made up, hidden_error, filter off"]["met"]
    assert goals["gemma, made up, hidden_error, xhead, all active tiles"]["met"]
    assert not goals["gemma, made up, hidden_error, xhead, all active tiles, 2^-8"]["met"]
    record |= {"goals": list(goals.values()), "suggested": gpu_verdicts.suggested(record)}
    printed = "\n".join(gpu_verdicts.lines(record))
    assert "MISSED: gemma, beyond_gradients, dense: 6e+08, limit 5.12e+08" in printed
    assert "not measured: llama3, both, dense: -" in printed
    assert "DENSE_SHARE = 0.3, FUSED_FORWARD = True" in printed


def test_nothing_measured_suggests_nothing():
    record = {"cases": []}
    assert gpu_verdicts.suggested(record) == {"DENSE_SHARE": None, "FUSED_FORWARD": None}
    assert {goal["met"] for goal in gpu_verdicts.goals(record)} == {None}


def test_the_shapes_and_kinds_that_are_measured():
    shapes = {name: tuple(shape[:3]) for name, shape in gpu.CASES.items()}
    assert shapes == {
        "gemma": (8192, 256000, 2304),
        "llama3": (8192, 128256, 4096),
        "qwen": (4096, 151936, 896),
        "llama2": (16384, 32000, 4096),
    }
    assert len(gpu.kinds(gpu.CASES["gemma"])) == 3
    assert {goal.case for goal in gpu_verdicts.GOALS} | set(gpu_verdicts.AHEAD) <= set(shapes)
    assert gpu.parse_arguments([]).budget_seconds + 40 <= 9 * 60
    files = gpu.parse_arguments([]).tests
    assert sorted(files) == sorted(f"tests/{path.name}" for path in (gpu.ROOT / "tests").glob("test_triton*.py"))


def test_other_packages_are_called_with_their_own_signatures(monkeypatch):
    """Each is a function of hidden states, weight and target, in the order that its package has."""
    calls = {}

    def module(name, function, order):
        def loss(*arguments, **options):
            calls[function] = options
            hidden, weight, target = (arguments[place] for place in order)
            return torch.nn.functional.cross_entropy(hidden @ weight.T, target)

        fake = types.ModuleType(name)
        setattr(fake, function, loss)
        monkeypatch.setitem(sys.modules, name, fake)

    module("cut_cross_entropy", "linear_cross_entropy", (0, 1, 2))
    module("liger_kernel", "_", (0, 1, 2))
    module("liger_kernel.transformers", "_", (0, 1, 2))
    module("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy", (0, 1, 2))
    module("quack", "_", (0, 1, 2))
    module("quack.linear_cross_entropy", "chunked_linear_cross_entropy", (0, 1, 2))
    hidden, weight, target = torch.randn(6, 4), torch.randn(9, 4), torch.randint(9, (6,))
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, target)
    for group in ("cut_cross_entropy", "liger", "quack"):
        for candidate in gpu_losses.GROUPS[group]:
            torch.testing.assert_close(candidate.make()(hidden, weight, target), expected)
    assert calls["linear_cross_entropy"] == {"filter_eps": None}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="needs a GPU.*--smoke"):
        gpu.main(["--tests"])
