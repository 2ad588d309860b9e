"""The recipe's ranking errors, its n-gram network, adaptive and sampled softmax, and the command that compares them."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from recipe_support import write_text
from torch import nn

import xhead
from recipes.one_billion_word import ranking
from recipes.one_billion_word.adaptive import CUTOFFS, AdaptiveLlama, cutoffs
from recipes.one_billion_word.ngram import NgramConfig, NgramForCausalLM
from recipes.one_billion_word.options import parse_options
from recipes.one_billion_word.packing import IGNORED
from recipes.one_billion_word.sampled import SampledSoftmax
from recipes.one_billion_word.scoring import TOP, AdaptiveScorer, LinearScorer
from recipes.one_billion_word.train import main, run
from tests.dense_losses import log_spherical, log_taylor
from tests.tiny import tiny

SMALL = {
    "block_length": 32,
    "embedding_size": 8,
    "hidden_sizes": "16,12",
    "per_device_train_batch_size": 4,
    "warmup_steps": 2,
    "learning_rate": 1e-2,
    "disable_tqdm": True,
    "use_cpu": True,
}


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    return write_text(tmp_path)


def command(data: Path, output: Path, *more: str, **options: object) -> list[str]:
    given = {"data": data, "output_dir": output, **SMALL, **options}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))] + list(more)


def ngram(context: int = 3) -> NgramForCausalLM:
    torch.manual_seed(0)
    return NgramForCausalLM(NgramConfig(50, context=context, embedding_size=6, hidden_sizes=(10, 8), bos_token_id=1))


def test_the_ngram_network_sees_its_context_and_no_other_sentence() -> None:
    model = ngram(context=3)
    ids = torch.randint(2, 50, (1, 9))
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
    whole = model(ids, position_ids=positions).logits[0]
    for place in range(9):
        within = ids[0, max(0, place - int(positions[0, place]), place - 2) : place + 1]
        words = torch.cat([torch.ones(3 - len(within), dtype=torch.long), within])  # <S> before the sentence
        embedded = model.body.embedding(words.flip(0)).flatten()
        for layer in model.body.layers:
            embedded = torch.tanh(layer(embedded))
        torch.testing.assert_close(whole[place], model.lm_head(embedded))


def test_a_patched_ngram_network_has_the_loss_of_stock() -> None:
    model, ids = ngram(), torch.randint(2, 50, (2, 9))
    expected = model(ids, labels=ids).loss
    xhead.patch(model)
    torch.testing.assert_close(model(ids, labels=ids).loss, expected)
    assert (xhead.status(model).cut, xhead.status(model).materialized) == (1, 0)


def test_a_saved_ngram_network_is_the_same(tmp_path: Path) -> None:
    model, ids = ngram(), torch.randint(2, 50, (2, 9))
    model.save_pretrained(tmp_path)
    again = NgramForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_the_network_of_a_preset() -> None:
    _, model, _, _ = parse_options(["--preset", "ngram"])
    assert (model.network, model.context, model.embedding_size) == ("ngram", 9, 512)
    assert model.parsed_hidden_sizes == (2048, 2048, 512)
    data, model, _, training = parse_options(["--preset", "ngram", "--block_length", "50", "--embedding_size", "7"])
    assert (data.block_length, model.embedding_size, training.per_device_train_batch_size) == (50, 7, 2)
    assert parse_options(["--preset", "ngram_small"])[1].parsed_hidden_sizes == (128, 128, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "bigram"], "--preset is 'bigram'; known: ngram, ngram_small"),
        (["--network", "rnn"], "--network is 'rnn'; known: transformer, ngram"),
        (["--head", "tree"], "--head is 'tree'; known: linear, adaptive, spherical"),
        (["--head", "spherical", "--loss", "cce"], "leave --loss cce out"),
        (["--head", "spherical", "--head_options", '{"loss": "hinge"}'], "unknown spherical loss 'hinge'"),
        (
            ["--head", "spherical", "--head_options", '{"learning_rate": 0}'],
            "learning_rate 0; it must be a number above",
        ),
        (["--hidden_sizes", "12,x"], "--hidden_sizes is '12,x'"),
        (["--hidden_sizes", "12,0"], "--hidden_sizes is 0; it must be at least 1"),
        (["--head", "adaptive", "--loss", "cce"], "leave --loss cce out"),
        (["--head", "adaptive", "--measure_memory", "True"], "need a linear head"),
        (["--loss", "sampled", "--loss_options", '{"samples": 0}'], "samples must be at least 1, got 0"),
        (["--loss", "zloss", "--loss_options", '{"a": 0}'], "a must be a finite number above 0"),
    ],
)
def test_bad_options_are_clear_errors(
    text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command(text_folder, tmp_path / "run"), *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("loss", ["stock", "zloss", "log_taylor", "log_spherical", "mse"])
def test_scores_of_a_linear_head(loss: str) -> None:
    torch.manual_seed(0)
    head = nn.Linear(6, 300, bias=False)
    hidden, target = 3 * torch.randn(80, 6), torch.randint(300, (80,))
    logits = head(hidden).double()
    order = {"log_taylor": (1 + logits).abs(), "log_spherical": logits.abs()}.get(loss, logits)
    expected = 1 + (order > order.gather(1, target[:, None])).sum(1)
    scorer = LinearScorer(head, loss, {"eps": 0.1} if loss == "log_spherical" else None, max_logits=700)
    with torch.no_grad():
        assert (scorer.ranks(hidden, target) - expected).abs().max() <= 1  # rounding may exchange neighbours
        assert scorer.defines_probability == (loss not in ("zloss", "mse"))
        if not scorer.defines_probability:
            with pytest.raises(ValueError, match=f"the loss '{loss}' defines no probability"):
                scorer.nll(hidden, target)
            return
        dense = {"log_taylor": log_taylor, "log_spherical": lambda o, y: log_spherical(o, y, 0.1)}
        exact = dense.get(loss, lambda o, y: nn.functional.cross_entropy(o, y, reduction="none"))(logits, target)
        torch.testing.assert_close(scorer.nll(hidden, target).double(), exact, rtol=1e-4, atol=1e-5)


def test_scores_of_an_adaptive_softmax() -> None:
    torch.manual_seed(0)
    head = nn.AdaptiveLogSoftmaxWithLoss(16, 200, [20, 60])
    hidden, target = torch.randn(50, 16), torch.randint(200, (50,))
    scorer = AdaptiveScorer(head, max_logits=999)
    with torch.no_grad():
        log_p = head.log_prob(hidden)
        expected = 1 + (log_p > log_p.gather(1, target[:, None])).sum(1)
        assert torch.equal(scorer.ranks(hidden, target), expected)
        torch.testing.assert_close(-scorer.nll(hidden, target), log_p.gather(1, target[:, None])[:, 0])


def test_cutoffs_of_the_adaptive_softmax() -> None:
    assert cutoffs(793_471) == list(CUTOFFS) == cutoffs(640_001)
    assert cutoffs(10_000) == [756, 1260, 8066]
    for words in (2, 3, 5, 40, 1000):
        found = cutoffs(words)
        assert found == sorted(set(found)) and found[0] >= 1 and found[-1] < words


def test_a_cluster_without_a_word_in_the_batch_has_a_gradient_of_zeros() -> None:
    """Processes add their gradients up, and each has its own words."""
    model = AdaptiveLlama(tiny("LlamaForCausalLM").config)
    words = torch.tensor([[1, 2, 0, 1]])
    model(input_ids=words, labels=words).loss.backward()
    rare = list(model.own_head.tail.parameters())
    assert all(torch.equal(each.grad, torch.zeros_like(each)) for each in rare)
    assert len(rare) >= 2


def test_the_adaptive_head_counts_labels_as_the_models_of_transformers_do() -> None:
    model = AdaptiveLlama(tiny("LlamaForCausalLM").config)
    ids = torch.randint(4, 60, (2, 12))
    labels = ids.clone()
    labels[:, :5] = IGNORED
    log_p = model(input_ids=ids).logits[:, :-1].gather(-1, ids[:, 1:, None])[..., 0][:, 4:]
    torch.testing.assert_close(model(input_ids=ids, labels=labels).loss, -log_p.mean())
    torch.testing.assert_close(model(input_ids=ids, labels=labels, num_items_in_batch=20).loss, -log_p.sum() / 20)


def test_sampled_softmax_is_right_on_average() -> None:
    """Its normaliser has the softmax's as its mean; with many draws the loss and its gradient are those of softmax."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(40, 4, requires_grad=True)
    labels = torch.randint(40, (6,))
    rows = SampledSoftmax(samples=200_000)(xhead.LazyLogits(hidden, weight), labels)
    # The target counts beside the draws with its own share, as if drawn exactly as often as expected.
    ids = torch.arange(40)
    drawn = SampledSoftmax.log_expected(ids, 200_000, 40).exp()
    assert drawn.sum().item() == pytest.approx(200_000, rel=1e-5)
    others = (hidden @ weight.T).exp().masked_fill(ids == labels[:, None], 0.0).sum(1)
    own = (hidden * weight[labels]).sum(1).exp() / drawn[labels]
    torch.testing.assert_close(rows, ((own + others) / own).log(), rtol=5e-3, atol=0)
    exact = torch.autograd.grad(((own + others) / own).log().sum(), hidden)[0]
    torch.testing.assert_close(torch.autograd.grad(rows.sum(), hidden)[0], exact, rtol=0.05, atol=0.02)


def test_draws_are_log_uniform_and_repeat_with_the_seed() -> None:
    first, second = SampledSoftmax(seed=3), SampledSoftmax(seed=3)
    cpu = torch.device("cpu")
    found = first.draw(100_000, 500, cpu)
    assert torch.equal(found, second.draw(100_000, 500, cpu))
    assert not torch.equal(found, first.draw(100_000, 500, cpu))
    share = torch.bincount(found, minlength=500) / 100_000
    expected = SampledSoftmax.log_expected(torch.arange(500), 1, 500).exp()
    assert (share - expected).abs().max() < 0.005


@pytest.mark.parametrize("network", ["ngram", "transformer"])
def test_a_run_with_a_spherical_head(text_folder: Path, tmp_path: Path, network: str) -> None:
    options = {"head": "spherical", "head_options": '{"loss": "log_taylor", "learning_rate": 20}', "network": network}
    shape = {"hidden_size": 16, "layers": 1, "max_steps": 30, "save_steps": 10, "logging_steps": 10}
    whole = run(*parse_options(command(text_folder, tmp_path / "whole", **options, **shape)))
    assert whole["train_loss"] < 3.6 and 1 < whole["test"]["perplexity"] < 40
    assert 0 < whole["valid"]["top_k_errors"]["10"] < 0.75
    part = command(text_folder, tmp_path / "part", **options, **shape)
    run(*parse_options(part))
    for file in (tmp_path / "part" / "checkpoint-30").iterdir():
        file.unlink()
    again = run(*parse_options([*part, "--resume", "True"]))
    assert again["valid"] == whole["valid"]


@pytest.mark.parametrize("loss", ["zloss", "log_taylor"])
def test_a_run_reports_errors_and_perplexity_only_of_probabilities(
    text_folder: Path, tmp_path: Path, loss: str, capsys: pytest.CaptureFixture[str]
) -> None:
    results = run(*parse_options(command(text_folder, tmp_path / "run", loss=loss, network="ngram", max_steps=40)))
    errors = results["valid"]["top_k_errors"]
    assert list(errors) == [str(k) for k in TOP] and list(errors.values()) == sorted(errors.values(), reverse=True)
    assert 0 < errors["10"] < 0.7 and errors["50"] == 0  # 43 words
    assert ("test" in results) == (results["valid"]["perplexity"] is not None) == (loss != "zloss")
    assert re.search(r"valid +error top-1 \d+\.\d+%", capsys.readouterr().out)
    assert results["patch"]["materialized"] == 0
    if loss == "zloss":
        logged = [entry["valid_top_1_error"] for entry in results["history"] if "valid_top_1_error" in entry]
        assert logged[-1] == errors["1"]
    else:
        assert 1 < results["test"]["perplexity"] < 60


def test_comparison(text_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "ranking"
    options = ["--method_options", '{"zloss": {"a": 0.5, "b": 3}, "spherical": {"margin": 3, "learning_rate": 0.5}}']
    options += ["--training_options", '{"cce": {"learning_rate": 0.002}}', "--split", "test"]
    arguments = command(text_folder, output, *options, steps=6, seconds=0.05)
    report = ranking.main(arguments)
    assert json.loads((output / "ranking.json").read_text()) == report
    assert (output / "ranking.png").stat().st_size > 1000
    assert list(report["methods"]) == ["stock", "cce", "zloss", "spherical", "adaptive", "sampled"]
    for method, found in report["methods"].items():
        assert found["at_steps"]["steps"] == 6
        assert found["at_seconds"]["seconds"] >= 0.05
        assert set(found["at_steps"]["errors"]) == {str(k) for k in TOP}
        assert (found["at_steps"]["perplexity"] is None) == (method in ("zloss", "spherical"))
    assert report["methods"]["zloss"]["loss_options"] == {"a": 0.5, "b": 3}
    assert report["methods"]["spherical"]["head_options"] == {"margin": 3, "learning_rate": 0.5}
    assert [report["methods"][name]["learning_rate"] for name in ("stock", "cce")] == [1e-2, 2e-3]
    parameters = {name: found["parameters"] for name, found in report["methods"].items()}
    assert parameters["spherical"] == parameters["stock"] == parameters["zloss"]
    assert report["split"] == "test" and report["tokens"] > 0
    table = (output / "ranking.md").read_text()
    assert table.count("| zloss |") == 2 and "6 steps each" in table and not math.isnan(report["seconds"])


def test_settings_of_a_preset_give_way_to_those_given() -> None:
    options = ranking.RankingOptions(method_options='{"zloss": {"b": 4}}', training_options='{"cce": {"seed": 7}}')
    parsed = {name: parse_options(ranking.command_line(name, options, [])) for name in ("cce", "zloss", "spherical")}
    tuned = ranking.TUNED["ngram_small"]
    assert [parsed[name][3].learning_rate for name in parsed] == [float(tuned[name][1]) for name in parsed]
    assert parsed["zloss"][1].parsed_loss_options == {"b": 4} and parsed["cce"][3].seed == 7
    assert parsed["spherical"][1].parsed_head_options["learning_rate"] > 0
    for rest in (["--learning_rate", "0.5"], ["--preset", "ngram"]):
        found = parse_options(ranking.command_line("cce", options, rest))[3].learning_rate
        assert found == (0.5 if "0.5" in rest else 1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "cce,nonsense"], "--loss is 'nonsense'"),
        (["--method_options", '{"mse": {}}'], "--method_options names mse, but --methods are stock, cce, zloss"),
        (["--method_options", "{"], "which is not JSON"),
        (["--training_options", '{"cce": 3}'], "it must be a JSON object of objects, one a method"),
        (["--split", "train"], "--split is 'train'; known: valid, test"),
        (["--method_options", '{"spherical": {"margins": 3}}'], "unknown option margins for spherical loss 'zloss'"),
        (["--steps", "0"], "--steps is 0"),
    ],
)
def test_bad_comparisons_are_clear_errors(
    text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        ranking.main([*command(text_folder, tmp_path / "ranking"), *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
