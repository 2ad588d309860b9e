"""The benchmark of the spherical losses runs, and every way it times gives the same gradients."""

import json

from benchmarks import spherical_losses


def test_command(tmp_path, capsys):
    output = tmp_path / "spherical_losses.json"
    shape = ["--rows", "3", "40", "--classes", "300", "--width", "8", "--micro-batches", "2", "--repeats", "1"]
    record = spherical_losses.main([*shape, "--output", str(output)])
    assert json.loads(output.read_text())["steps"] == record["steps"]
    assert [each["rows"] for each in record["steps"]] == [3] * 5 + [40] * 5
    for each in record["steps"]:
        if each["name"] != spherical_losses.STOCK:
            assert each["hidden_error"] < 1e-5 and each["weight_error"] < 1e-5, each["name"]
    assert "Gram, a micro-batch of 2" in capsys.readouterr().out
