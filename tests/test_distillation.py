"""Divergences between a teacher and a student against their definitions on dense float64 logits."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import xhead
from tests.dense import dense_logits, relative_error
from tests.largest import Largest
from tests.tiny import tiny, tokens
from xhead.losses import distillation

ROWS, CLASSES = 29, 1100  # more classes than a tile holds


def forward_kl(p, q):
    return (p * (p.log() - q.log())).sum(-1)


def jsd(p, q, beta):
    m = beta * p + (1 - beta) * q
    return beta * forward_kl(p, m) + (1 - beta) * forward_kl(q, m)


LOSSES = {
    "forward_kl": (distillation.forward_kl, forward_kl),
    "reverse_kl": (distillation.reverse_kl, lambda p, q: forward_kl(q, p)),
    "generalised_jsd": (distillation.generalised_jsd, lambda p, q: jsd(p, q, 0.5)),
    "generalised_jsd 0.1": (
        lambda student, teacher, **options: distillation.generalised_jsd(student, teacher, beta=0.1, **options),
        lambda p, q: jsd(p, q, 0.1),
    ),
}


def operands(size, dtype=torch.float64, rows=ROWS, classes=CLASSES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, size), (classes, size), (classes,))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


STUDENT, TEACHER = {"softcap": 6.0, "scale": 0.8}, {"softcap": None, "scale": 0.6}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", LOSSES)
def test_rows_and_gradients(name, temperature, dtype):
    slack = 1e-9 if dtype == torch.float64 else 1e-5
    ours, define = LOSSES[name]
    student, teacher = operands(7, dtype), operands(11, dtype, seed=1)
    rows = ours(xhead.LazyLogits(*student, **STUDENT), xhead.LazyLogits(*teacher, **TEACHER), temperature=temperature)
    p = (dense_logits(*teacher, **TEACHER) / temperature).softmax(-1)
    q = (dense_logits(*student, **STUDENT) / temperature).softmax(-1)
    defined = define(p, q)
    assert rows.dtype == dtype and rows.shape == (ROWS,)
    assert relative_error(rows, defined) < slack
    upstream = torch.randn(ROWS, dtype=dtype)
    mine = torch.autograd.grad(rows, student, upstream)
    true = torch.autograd.grad(defined, student, upstream.double())
    for found, exact in zip(mine, true, strict=True):
        assert relative_error(found, exact) < slack
    assert not ours(xhead.LazyLogits(*(t.detach() for t in student)), xhead.LazyLogits(*teacher)).requires_grad


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_by_finite_differences(name):
    student, teacher = operands(3, rows=4, classes=5), operands(2, rows=4, classes=5, seed=1)

    def rows(hidden, weight, bias):
        return LOSSES[name][0](
            xhead.LazyLogits(hidden, weight, bias, softcap=5.0), xhead.LazyLogits(*teacher), temperature=1.5
        )

    assert torch.autograd.gradcheck(rows, student)
    hidden, weight, bias = student
    assert torch.autograd.gradcheck(lambda weight: rows(hidden.detach(), weight, None), (weight,))
    assert torch.autograd.gradcheck(lambda hidden: rows(hidden, weight.detach(), bias.detach()), (hidden,))


@pytest.mark.parametrize("name", LOSSES)
def test_activation_checkpointing(name):
    student, teacher = operands(7), operands(11, seed=1)
    function = LOSSES[name][0]
    logits = xhead.LazyLogits(*student), xhead.LazyLogits(*teacher)
    found, expected = (
        torch.autograd.grad(rows.sum(), student)
        for rows in (checkpoint(function, *logits, use_reentrant=False), function(*logits))
    )
    for mine, exact in zip(found, expected, strict=True):
        assert torch.equal(mine, exact)


@pytest.mark.parametrize("name", LOSSES)
def test_more_rows_than_a_tile(name):
    ours, define = LOSSES[name]
    student, teacher = operands(3, rows=1030, classes=13), operands(2, rows=1030, classes=13, seed=1)
    rows = ours(xhead.LazyLogits(*student), xhead.LazyLogits(*teacher))
    defined = define(dense_logits(*teacher).softmax(-1), dense_logits(*student).softmax(-1))
    assert relative_error(rows, defined) < 1e-9
    for found, exact in zip(
        torch.autograd.grad(rows.sum(), student), torch.autograd.grad(defined.sum(), student), strict=True
    ):
        assert relative_error(found, exact) < 1e-9


@pytest.mark.parametrize("name", LOSSES)
def test_rows_that_do_not_count(name):
    student, teacher = operands(7), operands(11, seed=1)
    lazy = (
        xhead.LazyLogits(student[0].reshape(1, ROWS, 7), *student[1:]),
        xhead.LazyLogits(teacher[0].reshape(1, ROWS, 11), *teacher[1:]),
    )
    mask = torch.rand(1, ROWS) < 0.5
    whole, some = LOSSES[name][0](*lazy), LOSSES[name][0](*lazy, row_mask=mask)
    assert whole.shape == some.shape == (1, ROWS)
    assert torch.allclose(some, whole.where(mask, 0.0))
    for found, exact in zip(
        torch.autograd.grad(some.sum(), student), torch.autograd.grad((whole * mask).sum(), student), strict=True
    ):
        assert relative_error(found, exact) < 1e-12
    nothing = LOSSES[name][0](*lazy, row_mask=torch.zeros_like(mask))
    assert not nothing.any()
    assert all(not g.any() for g in torch.autograd.grad(nothing.sum(), student))
    empty = LOSSES[name][0](xhead.LazyLogits(student[0][:0], student[1]), xhead.LazyLogits(teacher[0][:0], teacher[1]))
    assert empty.shape == (0,)
    assert all(not g.any() for g in torch.autograd.grad(empty.sum(), student[:2]))


@pytest.mark.parametrize("name", LOSSES)
def test_peaks_and_equals(name):
    student, teacher = operands(7, torch.float32), operands(7, torch.float32, seed=1)
    rows = LOSSES[name][0](xhead.LazyLogits(*student, scale=40.0), xhead.LazyLogits(*teacher, scale=40.0))
    assert rows.isfinite().all() and (rows >= 0).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(rows.sum(), student))
    same = LOSSES[name][0](xhead.LazyLogits(*student), xhead.LazyLogits(*student))
    assert same.abs().max() < 1e-5
    assert all(g.abs().max() < 1e-4 for g in torch.autograd.grad(same.sum(), student))


@pytest.mark.parametrize("name", LOSSES)
def test_memory_is_that_of_a_tile(name):
    student, teacher = operands(3, rows=2100), operands(2, rows=2100, seed=1)
    with Largest() as seen:
        LOSSES[name][0](xhead.LazyLogits(*student), xhead.LazyLogits(*teacher)).sum().backward()
    assert seen.numel <= 1024 * 512


def test_dtypes_may_differ():
    student, teacher = operands(7, torch.bfloat16), operands(11, torch.float32, seed=1)
    rows = distillation.forward_kl(xhead.LazyLogits(*student), xhead.LazyLogits(*teacher))
    p, q = dense_logits(*teacher).softmax(-1), dense_logits(*student).softmax(-1)
    assert rows.dtype == torch.float32
    assert relative_error(rows, forward_kl(p, q)) < 1e-5
    assert [g.dtype for g in torch.autograd.grad(rows.sum(), student)] == [torch.bfloat16] * 3


def test_patched_models():
    student, teacher = tiny("LlamaForCausalLM"), tiny("Gemma2ForCausalLM", vocab_size=96)
    batch = {"input_ids": tokens()["input_ids"]}
    p, q = teacher(**batch).logits.softmax(-1), student(**batch).logits.softmax(-1)
    forward_kl(p, q).mean().backward()
    expected = student.lm_head.weight.grad
    student.zero_grad(set_to_none=True)
    xhead.patch(student)
    xhead.patch(teacher, lazy_eval=True)
    teacher.zero_grad(set_to_none=True)
    with torch.no_grad():
        theirs = teacher(**batch).logits
    rows = distillation.forward_kl(student(**batch).logits, theirs)
    torch.testing.assert_close(rows, forward_kl(p, q))
    rows.mean().backward()
    torch.testing.assert_close(student.lm_head.weight.grad, expected, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in teacher.parameters())
    assert xhead.status(student).materialized == xhead.status(teacher).materialized == 0


def test_what_is_refused():
    student, teacher = xhead.LazyLogits(*operands(7)), xhead.LazyLogits(*operands(7, classes=9))
    with pytest.raises(RuntimeError, match=r"one shape \(..., V\), got \(29, 1100\) and \(29, 9\)"):
        distillation.forward_kl(student, teacher)
    with pytest.raises(ValueError, match="temperature must be a positive number, got 0.0"):
        distillation.reverse_kl(student, student, temperature=0.0)
    with pytest.raises(ValueError, match=r"beta must lie in \(0, 1\), got 1.0; use forward_kl or reverse_kl"):
        distillation.generalised_jsd(student, student, beta=1.0)
    with pytest.raises(RuntimeError, match=r"row_mask must be torch.bool of shape \(29,\)"):
        distillation.forward_kl(student, student, row_mask=torch.ones(3, dtype=torch.bool))
