"""The forecasting recipe: its series, tokens and scores, the toy experiment, and both commands at a tiny size."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import fourier as fourier_benchmark
from recipes.common.errors import RecipeError
from recipes.forecasting import toy
from recipes.forecasting.compare import main, run
from recipes.forecasting.options import parse_options
from recipes.forecasting.scores import quantile_loss, scaled_error
from recipes.forecasting.series import load_series, made_up
from recipes.forecasting.smoothness import smoothness
from recipes.forecasting.toy_data import CENTRES, DISTRIBUTIONS, draw
from recipes.forecasting.windows import ValueTokens, split


def test_tokens():
    tokens = ValueTokens(8, -2.0, 2.0)
    values = torch.tensor([-9.0, -2.0, -0.01, 0.0, 1.99, 2.0, 9.0, torch.nan])
    assert tokens.encode(values).tolist() == [1, 1, 4, 5, 8, 8, 8, 0]
    assert torch.equal(tokens.decode(torch.tensor([1, 5, 8])), torch.tensor([-1.75, 0.25, 1.75]))
    assert tokens.decode(torch.tensor([0])).isnan()
    inner = torch.rand(50) * 4 - 2
    assert (tokens.decode(tokens.encode(inner)) - inner).abs().max() <= 0.25
    assert (tokens.vocabulary, tokens.token_range) == (9, (1, 9))


def test_series_from_files(tmp_path: Path):
    text = "date,load,empty,price\n" + "".join(f"2020-01-{day:02d},{day}.5,,{-day}\n" for day in range(1, 31))
    (tmp_path / "a.csv").write_text(text)
    series = load_series(str(tmp_path / "a.csv"), 0, 0)
    assert list(series.values) == ["load", "empty", "price"]
    assert series.values["load"][2] == 3.5 and np.isnan(series.values["empty"]).all()
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(text.encode()))
    assert "b:price" in load_series(str(tmp_path), 0, 0).values
    train, test = split(series, 3, 2, ValueTokens(8, -2.0, 2.0), 9, 4)
    assert train.tokens.shape[1] == test.tokens.shape[1] == 5
    assert torch.allclose(test.scale, test.values[:, :3].abs().mean(-1))
    assert not test.values.isnan().any()  # the empty column has no windows
    with pytest.raises(RecipeError, match="has 30 values; --context 20 and --horizon 2 need 110"):
        split(series, 20, 2, ValueTokens(8, -2.0, 2.0), 9, 4)
    (tmp_path / "none").mkdir()
    for wrong in ("nothing.csv", "none"):
        with pytest.raises(RecipeError, match="is no .csv or .csv.gz file, and no folder"):
            load_series(str(tmp_path / wrong), 0, 0)
    (tmp_path / "words.csv").write_text("a,b\nx,y\n")
    with pytest.raises(RecipeError, match="has no column of numbers"):
        load_series(str(tmp_path / "words.csv"), 0, 0)
    made = made_up(2, 100)
    assert all(np.array_equal(made.values[name], again) for name, again in made_up(2, 100).values.items())


def test_scores():
    truth = torch.tensor([[1.0, 2.0, torch.nan]]).double()
    exact = torch.tensor([1.0, 2.0, 5.0]).double().expand(1, 10, 3)
    assert quantile_loss(exact, truth) == 0
    # A point forecast's quantile loss is its absolute error over that of zero.
    assert quantile_loss(exact + 0.5, truth) == pytest.approx(2 * 0.5 / 3 * 1.0, rel=1e-6)
    past = torch.tensor([[1.0, 3.0, 2.0, 4.0]]).double()
    assert scaled_error(exact + 0.5, truth, past, season=2) == pytest.approx(0.5)


def test_smoothness_is_the_metric():
    masses = torch.rand(3, 21, dtype=torch.float64)
    masses /= masses.sum(-1, keepdim=True)
    expected = torch.zeros(3).double()
    offsets = torch.arange(-20, 21)
    for width in range(1, 101):
        blur = torch.exp(-(offsets.double() ** 2) / (2 * width**2))
        blur /= blur.sum()
        blurred = sum(weight * masses.roll(int(offset), -1) for offset, weight in zip(offsets, blur, strict=True))
        expected += 6 / (torch.pi * width) ** 2 * (masses - blurred).norm(dim=-1)
    assert torch.allclose(smoothness(masses), expected)
    assert smoothness(torch.full((21,), 1 / 21)) < 1e-12


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_toy_samples_have_the_stated_density(name):
    data = draw(name, 4000, 0)
    assert torch.allclose(data.truth.sum(-1), torch.ones(4000).double())
    drawn = torch.bincount(data.labels, minlength=50).double() / 4000
    inside = CENTRES.abs() < 0.7  # at the ends, samples from outside are put into the outermost bins
    assert (drawn - data.truth.mean(0))[inside].abs().max() < 0.015
    chosen = data.truth.gather(-1, data.labels[:, None]).clamp(min=1e-9).log().mean()
    assert chosen > data.truth.mean(0)[data.labels].clamp(min=1e-9).log().mean() + 0.3
    assert torch.equal(draw(name, 50, 3).labels, draw(name, 50, 3).labels)


def test_toy_networks_are_single_ones():
    networks = toy.Networks("fourier-6-1e-3", [1, 2], 0.5)
    inputs, labels = torch.randn(2, 7, 2), torch.randint(50, (2, 7))
    alone = []
    for index in range(2):
        hidden = inputs[index]
        for layer in range(2):
            hidden = (hidden @ networks.weights[layer][index] + networks.biases[layer][index]).relu()
        head = toy.make_head("fourier-6-1e-3", 0.5)
        with torch.no_grad():
            head.linear.weight.copy_(networks.weights[2][index].T)
            head.linear.bias.copy_(networks.biases[2][index, 0])
        alone.append(head.loss(hidden, labels[index]).mean())
        assert torch.allclose(networks.log_probs(inputs)[index], head(hidden), atol=1e-5)
    assert torch.allclose(networks.losses(inputs, labels), torch.stack(alone))


def test_toy_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["--heads", "dense", "fourier-12", "--distributions", "gaussian", "--seeds", "1", "2", "--epochs", "3"]
    toy.main([*arguments, "--samples", "500", "--output_dir", str(tmp_path)])
    assert "0.116 +- 0.043" in capsys.readouterr().out
    scores = json.loads((tmp_path / "toy.json").read_text())["scores"]
    assert 0 < scores["fourier-12"]["gaussian"]["2"]["kl"] < 5
    assert (tmp_path / "toy.png").stat().st_size > 5000
    for wrong, message in [
        (["--heads", "fourier-50"], "--heads has 'fourier-50': .*at most 49"),
        (["--heads", "gmm"], "--heads has 'gmm'"),
        (["--distributions", "cauchy"], "--distributions has cauchy; known: gaussian, mixture, beta"),
        (["--epochs", "0"], "at least 1"),
        (["--schedule", "linear"], "--schedule is linear; known are constant and cosine"),
    ]:
        with pytest.raises(SystemExit) as ended:
            toy.main(wrong)
        assert ended.value.code == 2
        assert re.search(message, capsys.readouterr().err)


def command(output: Path, *more: str) -> list[str]:
    fixed = (
        "--hidden_size 16 --layers 1 --attention_heads 2 --made_series 2 --made_length 600 --context 30 --horizon 6 "
        "--train_windows 200 --test_windows 6 --bins 64 --seeds 1 --max_steps 6 --warmup_steps 1 --samples 4 "
        "--use_cpu True --disable_tqdm True"
    )
    return ["--output_dir", str(output), *fixed.split(), *more]


def test_the_whole_command(tmp_path: Path):
    options = parse_options(command(tmp_path, "--heads", "dense", "fourier-8"))
    results = run(*options)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    (dense,), (fourier,) = results["runs"].values()
    assert (dense["head_parameters"], fourier["head_parameters"]) == (16 * 65, 17 * 18 + 17 * 2)
    assert fourier["nll"] < 4.2 and fourier["wql"] > 0
    assert (tmp_path / "fan.png").stat().st_size > 5000
    assert "less dense, same seed" in (tmp_path / "table.txt").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--heads", "spline"], "--heads has 'spline'; known are dense and fourier-N"),
        (["--heads", "dense", "dense"], "each may be there once"),
        (["--heads", "fourier-64"], "--heads fourier-64 with --bins 64: .*at most 63"),
        (["--context", "24"], "--context is 24; it must be more than --season, 24"),
        (["--low", "9"], "--low is 9.0 and --high 8.0"),
        (["--hidden_size", "30"], "--hidden_size is 30"),
        (["--samples", "1"], "--samples is 1; it must be at least 2"),
        (["--step", "0"], "not understood: --step 0"),
    ],
)
def test_bad_options_are_clear_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments, message):
    with pytest.raises(SystemExit) as ended:
        main(command(tmp_path, *arguments))
    assert ended.value.code == 2
    assert re.search(message, error := capsys.readouterr().err), error


def test_benchmark_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["--preset", "small", "--width", "16", "--repeats", "1", "--output", str(tmp_path / "fourier.json")]
    record = fourier_benchmark.main(arguments)
    assert "times faster" in capsys.readouterr().out
    for part in ("compared", "large"):
        losses = record[part]["losses"]
        assert all(loss["hidden_error"] < 1e-4 for loss in losses)
        assert losses[0]["loss"] == pytest.approx(losses[-1]["loss"], rel=1e-5)
    assert losses[-1]["beyond"] < losses[0]["beyond"]
    assert json.loads((tmp_path / "fourier.json").read_text()) == record
