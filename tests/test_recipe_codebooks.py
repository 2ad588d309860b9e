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

STARTS = ("scratch", "dense")
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
        (
            {"head_options": '{"codebook_size": 4}'},
            "--head_options needs --head spherical or vq; --head linear has no options",
        ),
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


def test_two_codes_a_word(tmp_path, capsys):
    options = {"max_steps": 4, "valid_steps": 4, "save_strategy": "no", "head": "vq"}
    chosen = '{"codebook_size": 7, "residual_size": 9, "frequent": 3}'
    run(*parse_options(words(write_text(tmp_path), output_dir=tmp_path / "run", head_options=chosen, **options)))
    assert "7 codes and 9 residual ones for 43 words" in capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["output_head"]["parameters"] == 16 * 16
    assert 0 < results["output_head"]["floor"] < results["test"]["loss"]


def test_comparison(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(codebooks, "REPEATS", 1)
    options = {"sizes": "8", "variants": "bias,two codes", "steps": 4, "tuning_steps": 2}
    arguments = words(write_text(tmp_path), output_dir=tmp_path / "out", **options)
    report = codebooks.main(arguments)
    found = [(each["variant"], each["rows"], each["start"]) for each in report["runs"]]
    cases = [("bias", 8), ("two codes", 8), ("bias", 43)]
    assert found == [("dense", None, "scratch"), *((*case, start) for case in cases for start in STARTS)]
    assert all(each["logits_seconds_median"] > 0 for each in report["runs"])
    assert torch.tensor([each["valid"]["perplexity"] for each in report["runs"]]).isfinite().all()
    table = (tmp_path / "out" / "codebooks.md").read_text()
    assert "| two codes | 8 | dense, then 2 steps |" in table
    assert (tmp_path / "out" / "codebooks.png").stat().st_size > 1000
    assert len(json.loads((tmp_path / "out" / "codebooks.json").read_text())["runs"]) == len(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": "4,x"}, "--sizes is '4,x'; give whole numbers"),
        ({"sizes": "2"}, "at least 4"),
        ({"variants": "plain,three codes"}, "--variants has three codes; known are plain, frequent, bias, two codes"),
    ],
)
def test_wrong_options_of_the_comparison(options, message, capsys):
    with pytest.raises(SystemExit):
        codebooks.main([word for name, value in options.items() for word in (f"--{name}", value)])
    assert message in capsys.readouterr().err
