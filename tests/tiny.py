"""Tiny models and comparisons that several tests share."""

import copy
from typing import Any

import torch

import xhead
from tests.shrink import shrink


def tiny(name: str, **changes: Any) -> Any:
    """A tiny random model of the class without dropout, in training mode."""
    import transformers

    cls = getattr(transformers, name)
    config = shrink(cls.config_class())
    without_dropout = {
        key: 0.0 for key, value in config.to_dict().items() if "drop" in key and isinstance(value, float)
    }
    for key, value in {**without_dropout, **changes}.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    return cls(config)


def tokens(rows: int = 2, length: int = 12, seed: int = 1) -> dict[str, torch.Tensor]:
    """Token ids, and labels of which the first few of each row are left out."""
    ids = torch.randint(4, 60, (rows, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :3] = -100
    return {"input_ids": ids, "labels": labels}


def twins(name: str, **changes: Any) -> tuple[Any, Any]:
    """A stock model, and a copy of it to patch."""
    plain = tiny(name, **changes).eval()
    return plain, copy.deepcopy(plain)


def assert_same_gradients(actual: Any, expected: Any, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    pairs = zip(actual.named_parameters(), expected.named_parameters(), strict=True)
    for (name, mine), (_, theirs) in pairs:
        assert (mine.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None:
            torch.testing.assert_close(
                mine.grad, theirs.grad, rtol=rtol, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
            )


def assert_same_step(patched: Any, plain: Any, batch: dict[str, Any], **tolerance: float) -> None:
    """One loss and its gradients, equal; cut once more and nothing materialised."""
    before = xhead.status(patched)
    patched.zero_grad(set_to_none=True)
    plain.zero_grad(set_to_none=True)
    actual, expected = patched(**batch).loss, plain(**batch).loss
    torch.testing.assert_close(actual, expected, rtol=tolerance.get("rtol", 1e-5), atol=tolerance.get("atol", 1e-6))
    actual.backward()
    expected.backward()
    assert_same_gradients(patched, plain, **tolerance)
    after = xhead.status(patched)
    assert (after.cut, after.materialized) == (before.cut + 1, 0), after
