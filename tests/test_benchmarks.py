"""The measuring tools: a measurement that could not fail would make every figure worthless."""

import json
import time

import pytest
import torch

from benchmarks import class_order, cpu, filter_accuracy, filter_training, inputs, measure, number_tokens, report, vq

MEGABYTE = 2**20


def allocate(megabytes: int) -> torch.Tensor:
    return torch.ones(megabytes * MEGABYTE // 4)


def test_time_interleaved_takes_turns_and_orders_by_duration():
    calls: list[str] = []

    def sleep(name: str, seconds: float) -> None:
        calls.append(name)
        time.sleep(seconds)

    timings = measure.time_interleaved(
        {"a": lambda: sleep("a", 0.002), "b": lambda: sleep("b", 0.02)}, repeats=3, warmup=1
    )
    assert calls == ["a", "b"] * 4
    assert [len(timing.seconds) for timing in timings.values()] == [3, 3]
    assert timings["b"].median >= 0.02
    assert timings["a"].median < timings["b"].median


@pytest.mark.parametrize(("callables", "repeats", "match"), [({}, 1, "empty"), ({"a": int}, 0, "repeats")])
def test_time_interleaved_refuses_nothing_to_do(callables, repeats, match):
    with pytest.raises(ValueError, match=match):
        measure.time_interleaved(callables, repeats=repeats)


def test_peak_memory_counts_what_is_held_at_once():
    def twice_one_after_another() -> None:
        for _ in range(2):
            allocate(8)

    def both_at_once() -> None:
        _held = [allocate(8), allocate(8)]

    assert measure.peak_memory(twice_one_after_another).allocated == pytest.approx(8 * MEGABYTE, rel=0.01)
    assert measure.peak_memory(both_at_once).allocated == pytest.approx(16 * MEGABYTE, rel=0.01)


def test_peak_memory_leaves_out_named_results_only_while_they_exist():
    kept: list[torch.Tensor] = []

    def scratch_then_result() -> None:
        kept.clear()
        scratch = allocate(12)
        del scratch
        kept.append(allocate(8))
        _small = allocate(2)

    scratch_then_result()
    kept.clear()
    memory = measure.peak_memory(scratch_then_result, results=lambda: kept)
    assert memory.allocated == pytest.approx(12 * MEGABYTE, rel=0.01)
    assert memory.beyond == pytest.approx(12 * MEGABYTE, rel=0.01)


def test_peak_memory_of_a_backward_pass():
    weight = torch.ones(MEGABYTE, requires_grad=True)

    def reset() -> None:
        weight.grad = None

    def backward() -> None:
        weight.exp().sum().backward()  # keeps its output, as large as the gradient, until the gradient is there

    backward()
    memory = measure.peak_memory(backward, results=lambda: [weight.grad], reset=reset)
    assert memory.allocated == pytest.approx(8 * MEGABYTE, rel=0.01)
    assert memory.beyond == pytest.approx(4 * MEGABYTE, rel=0.01)


@pytest.mark.parametrize("pieces", [1, 128])
def test_resident_peak_sees_memory_that_is_written(pieces):
    def call() -> list[torch.Tensor]:
        return [torch.ones(64 * MEGABYTE // 4 // pieces) for _ in range(pieces)]

    call()
    memory = measure.peak_memory(call)
    if memory.resident is None:
        pytest.skip("this system does not tell a process's peak")
    assert 50 * MEGABYTE < memory.resident < 200 * MEGABYTE


@pytest.mark.parametrize(
    ("changes", "results", "expected"),
    [
        ([], [], (0, 0)),
        ([10, 20, -10, -20], [], (30, 30)),
        ([10, 20, -10], [20], (30, 10)),
        ([20, -20, 20, 5], [20], (25, 20)),  # the first block of the size is not the result
        ([7, 7, 7, -7], [7, 7], (21, 7)),
        ([-50, 10, 10], [10], (0, 0)),  # freed what was held before
    ],
)
def test_peak_of_events(changes, results, expected):
    assert measure.peak_of_events(changes, results) == expected


def test_environment_names_device_and_versions():
    record = measure.environment()
    assert record["torch"] == torch.__version__
    assert record["threads"] == torch.get_num_threads()
    assert record["cpu"]


def test_trained_like_inputs_have_the_kept_share_asked_for():
    made = inputs.trained_like(512, 2048, 64, kept_share=0.03, seed=1)
    softmax = inputs.softmax_of(made)
    assert softmax.kept_share["2^-12"] == pytest.approx(0.03, rel=0.15)
    # Targets drawn from the softmax cost its entropy, up to the noise of 512 draws.
    assert torch.log(torch.tensor(softmax.perplexity)).item() == pytest.approx(softmax.entropy, abs=0.4)
    with pytest.raises(ValueError, match="kept_share must lie between"):
        inputs.trained_like(64, 2048, 64, kept_share=0.9)


def test_random_initialisation_is_nearly_uniform():
    softmax = inputs.softmax_of(inputs.random_initialisation(64, 1000, 32))
    assert softmax.entropy == pytest.approx(torch.log(torch.tensor(1000.0)).item(), abs=0.05)


def test_load_reads_a_saved_head(tmp_path):
    from safetensors.torch import save_file

    tensors = {"hidden": torch.randn(6, 4), "weight": torch.randn(9, 4), "target": torch.arange(6)}
    save_file(tensors, tmp_path / "head.safetensors")
    made = inputs.load(tmp_path / "head.safetensors", rows=5)
    assert made.shape == {"N": 5, "V": 9, "D": 4}
    assert torch.equal(made.weight, tensors["weight"])
    with pytest.raises(ValueError, match="6 rows"):
        inputs.load(tmp_path / "head.safetensors", rows=7)
    save_file({"hidden": tensors["hidden"]}, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match="lacks weight, target"):
        inputs.load(tmp_path / "half.safetensors")


def test_markdown_table_lines_up():
    lines = report.markdown_table(["loss", "s"], [["stock", 1.5], ["ours", 10]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2] == "| stock | 1.5 |"
    with pytest.raises(ValueError, match="1 cells for 2 columns"):
        report.markdown_table(["a", "b"], [[1]])


@pytest.mark.parametrize(("value", "text"), [(2.0**-12, "2^-12"), (None, "off"), (0.0, "off"), (0.3, "0.3")])
def test_power_of_two(value, text):
    assert report.power_of_two(value) == text


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "results" / "a.json"
    report.save_json(path, {"runs": [1]})
    with pytest.raises(TypeError):
        report.save_json(path, {"runs": object()})
    assert '"runs"' in path.read_text()


TINY = ["--rows", "96", "--classes", "2048", "--width", "32", "--kept_share", "0.03", "--repeats", "1"]


def test_cpu_command(tmp_path, capsys):
    record = cpu.main([*TINY, "--filters", "off", "8", "--output", str(tmp_path / "cpu.json")])
    printed = capsys.readouterr().out
    assert "xhead, filter 2^-8" in printed
    assert "bare GEMM" in printed
    assert "share" in printed or "% of the entries" in printed
    errors = {row["name"]: row["hidden_error"] for row in record["training"]}
    assert errors[cpu.STOCK] == 0
    assert errors["xhead, filter off"] < 1e-5
    assert 1e-5 < errors["xhead, filter 2^-8"] < 0.5
    assert json.loads((tmp_path / "cpu.json").read_text())["training"][0]["median"] > 0


def test_class_order_command(tmp_path, capsys):
    arguments = ["--rows", "512", "--classes", "2048", "--width", "32", "--kept_share", "0.03", "--exponents", "8"]
    record = class_order.main([*arguments, "--output", str(tmp_path / "order.json")])
    shares = {each["order"]: each["tiles"]["128 x 128"] for each in record["orders"]}
    assert len(shares) == 4
    assert shares["largest probability"] == min(shares.values())
    assert class_order.order_table(record["orders"]) in capsys.readouterr().out


def test_visited_tiles():
    kept = torch.zeros(5, 7, dtype=torch.bool)
    kept[0, 0] = kept[0, 5] = kept[3, 1] = True
    assert class_order.visited(kept, torch.arange(7), 2, 3) == 3 / 4
    assert class_order.visited(kept, torch.tensor([0, 5, 1, 2, 3, 4, 6]), 2, 3) == 2 / 4


def test_filter_accuracy_command(tmp_path):
    record = filter_accuracy.main([*TINY, "--exponents", "6", "10", "--output", str(tmp_path / "accuracy.json")])
    errors = {(row["name"], row["filter_eps"]): row["hidden_error"] for row in record["filter"]}
    assert errors["stock", None] < 1e-5
    assert errors["exact", None] < 1e-5
    for eps in (2.0**-6, 2.0**-10):
        assert errors["compensated", eps] < errors["dropped", eps]
    assert (tmp_path / "accuracy.png").stat().st_size > 1000


def test_number_tokens_command(tmp_path, capsys):
    record = number_tokens.main([*TINY, "--repeats", "3", "--output", str(tmp_path / "numbers.json")])
    assert "`cce+0.3*ntl_was`, `reweigh=True`" in capsys.readouterr().out
    assert [(row["number_tokens"], row["reweigh"]) for row in record["losses"]] == [
        (0, False), (10, False), (10, True), (1110, False), (1110, True)
    ]  # fmt: skip
    assert record["losses"][0]["ratios"] == [1.0] * 3
    assert json.loads((tmp_path / "numbers.json").read_text())["losses"][1]["ratio"] > 0
    with pytest.raises(ValueError, match="1110 numbers of up to 3 digits are more than the 99 classes"):
        number_tokens.number_tokens(3, 99, 0)


def test_exact_gradients_are_those_of_autograd():
    made = inputs.random_initialisation(20, 50, 8)
    hidden, weight = made.hidden.double().requires_grad_(), made.weight.double().requires_grad_()
    torch.nn.functional.cross_entropy(hidden @ weight.T, made.target).backward()
    ours = filter_accuracy.exact_gradients(made, block=7)
    torch.testing.assert_close(ours[0], hidden.grad)
    torch.testing.assert_close(ours[1], weight.grad)


def test_filter_training_command_goes_on_where_it_stopped(tmp_path, capsys):
    text = tmp_path / "text"
    text.mkdir()
    for split in ("train", "valid", "test"):
        (text / f"{split}.txt").write_text("the cat sat on a mat .\na dog ran to the cat .\n" * 60)
    arguments = ["--data", str(text), "--classes", "12", "--width", "4", "--steps", "4"]
    arguments += ["--batch", "2", "--length", "4", "--output", str(tmp_path / "training.json"), "--settings"]
    first = filter_training.main([*arguments, "exact", "--seeds", "0"])
    again = filter_training.main([*arguments, "exact", "compensated:3", "--seeds", "0"])
    assert [(run["setting"], run["seed"]) for run in again["runs"]] == [("exact", 0), ("compensated:3", 0)]
    assert again["runs"][0] == first["runs"][0]
    assert "compensated 2^-3" in capsys.readouterr().out
    with pytest.raises(ValueError, match="another configuration"):
        filter_training.main([*arguments, "exact", "--steps", "5"])
    with pytest.raises(ValueError, match="dropped:N"):
        filter_training.main([*arguments, "halved:3"])


def test_vq_command_shows_memory_that_does_not_grow(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "_resident_peak", lambda function: None)
    arguments = ["--rows", "64", "--width", "8", "--codes", "16", "--logit_rows", "2", "--repeats", "1"]
    record = vq.main([*arguments, "--classes", "256", "4096", "--output", str(tmp_path / "vq.json")])
    found = {(size["classes"], size["name"]): size for size in record["sizes"]}
    for name in ("K = 16, bias none", "K = 16, bias frequency"):
        assert found[256, name]["allocated"] == found[4096, name]["allocated"]
        assert found[256, name]["parameters"] == found[4096, name]["parameters"] == 16 * 8
    assert found[4096, vq.STOCK]["beyond_gradients"] >= 64 * 4096 * 4
    assert json.loads((tmp_path / "vq.json").read_text())["sizes"] == record["sizes"]
