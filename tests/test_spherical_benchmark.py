"""The benchmark of the spherical head runs, and what it says of memory holds."""

import json

import pytest
import torch

from benchmarks import spherical
from benchmarks.measure import peak_allocated
from xhead.heads import SphericalHead


def test_command(tmp_path, capsys):
    record = spherical.main(["--small", "--output", str(tmp_path / "spherical.json")])
    assert json.loads((tmp_path / "spherical.json").read_text())["steps"] == record["steps"]
    assert [(each["name"].split()[0], each["classes"]) for each in record["steps"]] == [
        ("spherical", 1000), ("spherical", 5000), ("adaptive", 5000), ("dense", 5000),
    ]  # fmt: skip
    assert "MB beyond the weight" in capsys.readouterr().out
    assert (tmp_path / "spherical.png").stat().st_size > 1000


@pytest.mark.parametrize("stabilise_every", [1, 1000])
def test_memory_of_a_step_does_not_depend_on_the_classes(stabilise_every):
    peaks = []
    for classes in (2_000, 200_000):
        head = SphericalHead(32, classes, "mse", stabilise_every=stabilise_every)
        head.weight.mixing.mul_(torch.linspace(0.1, 1, 32)[:, None] if stabilise_every == 1 else 1.0)
        hidden, labels = torch.randn(50, 32), torch.randint(classes, (50,))

        def step(head=head, hidden=hidden, labels=labels):
            head(hidden, labels).backward()
            head.step(1e-3)

        peaks.append(peak_allocated(step)[0])
    # A pass over the factor goes in blocks of 2^20 numbers: two of them, in float32.
    assert peaks[1] < (1e6 if stabilise_every > 1 else 2 * 4 * 2**20 + 1e6)
    assert stabilise_every == 1 or peaks[1] < 1.1 * peaks[0]
