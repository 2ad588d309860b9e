"""Top-k, ranks and temperatures against all scores at once; and what the spherical head makes of them."""

import sys

import pytest
import torch

from benchmarks.measure import peak_allocated
from tests.dense import relative_error
from xhead.heads import SphericalHead
from xhead.retrieval import MaximumInnerProduct, fit_inverse_temperature, ranks, topk

ROWS, CLASSES, SIZE = 23, 501, 7


def inputs(dtype=torch.float64):
    hidden, weight = torch.randn(ROWS, SIZE, dtype=dtype), torch.randn(CLASSES, SIZE, dtype=dtype)
    return hidden, weight, torch.randn(CLASSES, dtype=dtype), torch.randn(ROWS, dtype=dtype)


@pytest.mark.parametrize("block", [1, 7, 100, 10_000])
@pytest.mark.parametrize("k", [1, 5, 150, CLASSES])
def test_topk_is_that_of_all_scores(k, block):
    hidden, weight, bias, offset = inputs()
    scores = hidden @ weight.T
    for given, expected in (
        ({}, scores),
        ({"bias": bias, "offset": offset}, scores + bias + offset[:, None]),
    ):
        found = topk(hidden, weight, k, block=block, **given)
        true = expected.topk(k, dim=1)
        assert torch.equal(found.classes, true.indices)
        assert torch.allclose(found.scores, true.values)


def test_topk_in_another_order_and_shape():
    hidden, weight, _, offset = inputs()
    found = topk(
        hidden[:22].reshape(2, 11, SIZE), weight, 3, offset=offset[:22].reshape(2, 11), order=torch.abs, block=50
    )
    scores = hidden[:22] @ weight.T + offset[:22, None]
    true = scores.abs().topk(3, dim=1).indices
    assert found.classes.shape == (2, 11, 3)
    assert torch.equal(found.classes.reshape(22, 3), true)
    assert torch.allclose(found.scores.reshape(22, 3), scores.gather(1, true))
    assert topk(hidden[:0], weight, 3).classes.shape == (0, 3)


def test_topk_and_ranks_hold_a_block_of_scores():
    hidden, weight = torch.randn(64, 16), torch.randn(50_000, 16)
    target = torch.zeros(64, dtype=torch.int64)
    for function in (lambda: topk(hidden, weight, 10, block=1000), lambda: ranks(hidden, weight, target, block=1000)):
        assert peak_allocated(function)[0] < 64 * 50_000 * 4 / 8


@pytest.mark.parametrize("block", [1, 7, 10_000])
def test_ranks_are_places_in_the_sorted_scores(block):
    hidden, weight, bias, offset = inputs()
    target = torch.randint(CLASSES, (ROWS,))
    scores = hidden @ weight.T + bias + offset[:, None]
    for order, key in ((None, scores), (torch.abs, scores.abs())):
        places = (key.argsort(1, descending=True) == target[:, None]).nonzero()[:, 1] + 1
        found = ranks(hidden, weight, target, bias=bias, offset=offset, order=order, block=block)
        assert found.dtype == torch.int64 and torch.equal(found, places)


def test_ties_count_as_asked():
    weight = torch.tensor([[2.0], [1.0], [1.0], [1.0], [0.0]])
    hidden, target = torch.ones(5, 1), torch.arange(5)
    for ties, expected in (
        ("best", [1, 2, 2, 2, 5]), ("worst", [1, 4, 4, 4, 5]), ("mean", [1.0, 3.0, 3.0, 3.0, 5.0]),
    ):  # fmt: skip
        assert ranks(hidden, weight, target, ties=ties, block=2).tolist() == expected
    constant = ranks(torch.zeros(2, 1), weight, target[:2])
    assert constant.tolist() == [5, 5]


def test_wrong_questions():
    hidden, weight, bias, _ = inputs()
    for k in (0, CLASSES + 1):
        with pytest.raises(ValueError, match=f"k must be from 1 to the number of classes, {CLASSES}, got {k}"):
            topk(hidden, weight, k)
    with pytest.raises(ValueError, match="block must be at least 1 class, got 0"):
        topk(hidden, weight, 1, block=0)
    with pytest.raises(RuntimeError, match=r"must share D, got \(23, 6\) and \(501, 7\)"):
        topk(hidden[:, 1:], weight, 1)
    with pytest.raises(RuntimeError, match=r"offset must be \(23,\)"):
        topk(hidden, weight, 1, offset=bias)
    target = torch.zeros(ROWS, dtype=torch.int64)
    with pytest.raises(ValueError, match="ties must be one of best, mean, worst, got 'fair'"):
        ranks(hidden, weight, target, ties="fair")
    with pytest.raises(IndexError, match="target 501 is out of bounds"):
        ranks(hidden, weight, target + CLASSES)
    with pytest.raises(RuntimeError, match=r"target must be \(23,\)"):
        ranks(hidden, weight, target[:3])


def drawn(scores):
    return torch.distributions.Categorical(logits=scores).sample()


@pytest.mark.parametrize("true", [0.05, 1.0, 6.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_temperature_is_the_most_likely_one(true, with_bias):
    hidden, weight, bias, _ = inputs()
    hidden, bias = hidden.repeat(20, 1), bias if with_bias else None
    scores = hidden @ weight.T + (0 if bias is None else bias)
    target = drawn(true * scores)
    factor = fit_inverse_temperature(hidden, weight, target, bias=bias)

    def likelihood(factor):
        return (factor * scores).log_softmax(1).gather(1, target[:, None]).mean()

    assert factor == pytest.approx(true, rel=0.3)
    assert likelihood(factor) > max(likelihood(0.999 * factor), likelihood(1.001 * factor))


def test_temperatures_that_do_not_exist():
    hidden, weight, _, _ = inputs()
    scores = hidden @ weight.T
    with pytest.raises(ValueError, match="lie above all others.*without bound"):
        fit_inverse_temperature(hidden, weight, scores.argmax(1))
    with pytest.raises(ValueError, match="below their rows' mean.*of 0"):
        fit_inverse_temperature(hidden, weight, scores.argmin(1))
    with pytest.raises(ValueError, match="no rows"):
        fit_inverse_temperature(hidden[:0], weight, scores.argmax(1)[:0])


def trained(name, **options):
    """A head after a few steps, so that U and omega are not trivial, with its hidden states and dense scores."""
    head = SphericalHead(SIZE, CLASSES, name, dtype=torch.float64, **options)
    hidden = torch.randn(2, 20, SIZE, dtype=torch.float64)
    for _ in range(5):
        head(hidden, torch.randint(CLASSES, (2, 20))).backward()
        head.step(0.02 if name == "mse" else 0.3)
        head.zero_grad()
    features = torch.nn.functional.pad(hidden, (0, 1), value=head.bias) if head.bias else hidden
    return head, hidden, features @ head.dense().T


ORDERS = {
    "mse": lambda o: o,
    "zloss": lambda o: o,
    "log_taylor": lambda o: 1 + o + o * o / 2,
    "log_spherical": torch.abs,
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ORDERS)
def test_a_heads_best_classes_ranks_and_scores(name, bias):
    head, hidden, scores = trained(name, bias=bias)
    key = ORDERS[name](scores)
    found = head.topk(hidden, 4, block=60)
    assert torch.equal(found.classes, key.topk(4).indices)
    assert torch.allclose(found.scores, scores.gather(-1, found.classes))
    labels = torch.randint(CLASSES, (2, 20))
    places = (key.argsort(-1, descending=True) == labels[..., None]).nonzero()[:, -1] + 1
    assert torch.equal(head.ranks(hidden, labels, block=60), places.reshape(2, 20))
    classes = torch.randint(CLASSES, (2, 20, 3))
    assert torch.allclose(head.scores(hidden, classes), scores.gather(-1, classes))
    with pytest.raises(IndexError, match="class 501 is out of bounds"):
        head.scores(hidden, torch.full((2, 20, 1), CLASSES))


@pytest.mark.parametrize("name", ["log_taylor", "log_spherical"])
@pytest.mark.parametrize("bias", [False, 0.5])
def test_probabilities_of_the_losses_that_have_them(name, bias):
    head, hidden, scores = trained(name, bias=bias)
    labels = torch.randint(CLASSES, (2, 20))
    numerator = 1 + scores + scores**2 / 2 if name == "log_taylor" else scores**2 + head.loss.eps
    expected = (numerator / numerator.sum(-1, keepdim=True)).log().gather(-1, labels[..., None])[..., 0]
    assert relative_error(head.log_probability(hidden, labels), expected) < 1e-12
    assert head.perplexity(hidden, labels) == pytest.approx(float(expected.mean().neg().exp()))
    with pytest.raises(ValueError, match="has probabilities of its own"):
        head.fit_temperature(hidden, labels)


@pytest.mark.parametrize("name", ["zloss", "mse"])
def test_probabilities_by_a_temperature(name):
    head, hidden, scores = trained(name)
    compared = (
        scores
        if name == "mse"
        else (scores - scores.mean(-1, keepdim=True)) / scores.std(-1, keepdim=True, correction=0)
    )
    labels = drawn(2.0 * compared)
    for question in (head.log_probability, head.perplexity):
        with pytest.raises(RuntimeError, match=r"are no log-probabilities: call fit_temperature\(hidden, labels\)"):
            question(hidden, labels)
    temperature = head.fit_temperature(hidden, labels)
    log_p = (compared / temperature).log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    assert torch.allclose(head.log_probability(hidden, labels), log_p)
    for other in (0.98, 1.02):
        assert log_p.mean() > (compared / (other * temperature)).log_softmax(-1).gather(-1, labels[..., None]).mean()
    again = SphericalHead(SIZE, CLASSES, name, dtype=torch.float64)
    again.load_state_dict(head.state_dict())
    assert again.perplexity(hidden, labels) == pytest.approx(float(log_p.mean().neg().exp()))


def test_an_approximate_index_and_its_recall():
    pytest.importorskip("faiss")
    hidden, weight, bias, _ = inputs(torch.float32)
    exact = MaximumInnerProduct(weight, bias, description="Flat")
    found = exact.topk(hidden[:22].reshape(2, 11, SIZE), 5)
    true = topk(hidden[:22].reshape(2, 11, SIZE), weight, 5, bias=bias)
    assert torch.equal(found.classes, true.classes) and torch.allclose(found.scores, true.scores, atol=1e-5)
    assert exact.recall(hidden, 5) == 1.0
    coarse = [MaximumInnerProduct(weight, description="IVF8,Flat", nprobe=n).recall(hidden, 5) for n in (1, 8)]
    assert coarse[0] < coarse[1] == 1.0
    with pytest.raises(AttributeError, match="IndexFlat has no attribute 'nprobes'"):
        MaximumInnerProduct(weight, description="Flat", nprobes=3)


def test_an_index_is_written_and_read(tmp_path):
    pytest.importorskip("faiss")
    hidden, weight, bias, _ = inputs(torch.float32)
    written = MaximumInnerProduct(weight, bias, description="IVF8,Flat", nprobe=8)
    written.save(tmp_path / "index")
    read = MaximumInnerProduct.load(tmp_path / "index", weight, bias, nprobe=8)
    assert torch.equal(read.topk(hidden, 5).classes, written.topk(hidden, 5).classes)
    with pytest.raises(ValueError, match=f"is an index of {len(weight)} vectors of {SIZE + 1} numbers; this weight"):
        MaximumInnerProduct.load(tmp_path / "index", weight)


def test_an_index_without_faiss_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match="pip install faiss-cpu, or use topk"):
        MaximumInnerProduct(torch.randn(5, 2))
