"""The One Billion Word recipe with a codebook in the projection's place, and the comparison of codebooks."""

import json
import re

import pytest
import torch
from recipe_support import write_text

import xhead
from recipes.one_billion_word import codebooks
from recipes.one_billion_word.options import parse_options
from recipes.one_billion_word.train import main, run

TINY = {
    "hidden_size": 16,
    "layers": 1,
    "attention_heads": 2,
    "block_length": 32,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "warmup_steps": 2,
    "learning_rate": 1e-2,
    "min_count": 1,
    "disable_tqdm": True,
    "use_cpu": True,
}


def words(folder, **more):
    options = {**TINY, "data": folder, **more}
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "vq", "loss": "cce"}, "--head vq has a loss of its own: leave --loss cce out"),
        ({"head_options": '{"codebook_size": 4}'}, "--head_options needs --head vq; --head linear has no options"),
        ({"head": "vq", "head_options": "[]"}, "--head_options is '\\[\\]'; it must be a JSON object"),
        ({"head": "vq", "head_options": '{"size": 4}'}, "--head vq --head_options .*unknown option size"),
        ({"head": "vq", "head_options": '{"codebook_size": 0}'}, "codebook_size must be a whole number"),
        (
            {"head": "vq", "head_options": '{"codebook_size": 400}'},
            "codebook_size must be at most the number of tokens",
        ),
        ({"head": "vq", "measure_memory": True}, "need a linear head, got --head vq"),
        ({"start_from": "nowhere"}, "--start_from is nowhere: .*holds no model"),
    ],
)
def test_bad_options_are_clear_errors(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(words(write_text(tmp_path), output_dir=tmp_path / "run", **options))
    error = capsys.readouterr().err
    assert re.search(message, error), error


def test_from_scratch_and_from_a_trained_model(tmp_path, capsys):
    text = write_text(tmp_path)
    common = {"max_steps": 6, "valid_steps": 3, "save_strategy": "no"}
    run(*parse_options(words(text, output_dir=tmp_path / "dense", **common)))
    vq = {**common, "head": "vq", "head_options": '{"codebook_size": 8, "frequent": 3}'}
    scratch = run(*parse_options(words(text, output_dir=tmp_path / "scratch", **vq)))
    assert "8 codes for 43 words, 3 of them with a code of their own; no loss below" in capsys.readouterr().out
    model = xhead.load(tmp_path / "scratch" / "model")
    assert scratch["output_head"]["parameters"] == 8 * 16
    assert scratch["output_head"]["floor"] < scratch["test"]["loss"]
    assert scratch["output_head"]["options"]["start"] == "frequency"
    assert model.config.xhead_head["frequent"] == 3
    trained = {**vq, "start_from": tmp_path / "dense"}
    pytest.importorskip("sklearn")
    tuned = run(*parse_options(words(text, output_dir=tmp_path / "tuned", **trained)))
    assert tuned["output_head"]["parameters"] == 8 * 16 + 43
    with pytest.raises(Exception, match="whose words are not those of this data"):
        run(*parse_options(words(text, output_dir=tmp_path / "other", **{**trained, "min_count": 100})))


def test_comparison(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(codebooks, "REPEATS", 1)
    arguments = words(write_text(tmp_path), output_dir=tmp_path / "out", sizes="4,8", steps=4, tuning_steps=2)
    report = codebooks.main(arguments)
    assert list(report["runs"]) == ["dense", "scratch 4", "dense 4", "scratch 8", "dense 8"]
    assert all(found["logits_seconds_median"] > 0 for found in report["runs"].values())
    assert torch.tensor([found["valid"]["perplexity"] for found in report["runs"].values()]).isfinite().all()
    table = (tmp_path / "out" / "codebooks.md").read_text()
    assert "| K = 8 | dense, then 2 steps |" in table
    assert (tmp_path / "out" / "codebooks.png").stat().st_size > 1000
    assert json.loads((tmp_path / "out" / "codebooks.json").read_text())["runs"].keys() == report["runs"].keys()
    with pytest.raises(SystemExit):
        codebooks.main([*arguments, "--sizes", "4,x"])
