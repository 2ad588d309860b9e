"""The label side of extreme classification: gradient caching, the classifier that steps in the backward, batches."""

import pytest
import torch
from torch import nn

import xhead
from benchmarks.measure import peak_allocated
from tests.dense import relative_error
from xhead.heads import InPlaceClassifier, LabelEncoderHead
from xhead.heads.in_place import stochastically_rounded
from xhead.heads.label_batches import candidates, clustered_batches, drawn_negatives, hard_negatives, random_negatives
from xhead.losses import get_loss

ROWS, LABELS, SIZE, LENGTH = 13, 57, 6, 5


class Encoder(nn.Module):
    def __init__(self, dropout=0.3, width=16):
        super().__init__()
        self.table = nn.Embedding(40, width)
        self.layers = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, SIZE))

    def forward(self, token_ids, mask):
        return self.layers((self.table(token_ids) * mask[..., None]).sum(1))


def texts(count, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.randint(2, (count, LENGTH), generator=generator).float()
    return {"token_ids": torch.randint(40, (count, LENGTH), generator=generator), "mask": mask}


def right_labels():
    labels = torch.randint(-1, LABELS, (ROWS, 3), generator=torch.Generator().manual_seed(2))
    labels[0] = LABELS - 1
    return labels


def plainly(encoder, inputs, chunk, own=None):
    """All labels at once in one graph; in chunks only so that dropout draws the same numbers."""
    pieces = [encoder(**{k: v[i : i + chunk] for k, v in inputs.items()}) for i in range(0, LABELS, chunk)]
    vectors = torch.cat(pieces)
    return vectors if own is None else vectors + own


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("own", [None, SIZE])
@pytest.mark.parametrize("shared", [True, False])
def test_gradient_caching_is_the_plain_gradient(normalise, own, shared):
    torch.manual_seed(0)
    encoder = Encoder().double()
    head = LabelEncoderHead(encoder, texts(LABELS, 0), chunk=10, normalise=normalise, own_vectors=own).double()
    if own:
        head.own.data.normal_()
    queries = encoder if shared else Encoder().double()
    parameters = list({*queries.parameters(), *head.parameters()})
    loss = get_loss("decoupled_softmax", temperature=0.5)
    found = []
    for cached in (True, False):
        torch.manual_seed(1)
        hidden = queries(**texts(ROWS, 1))
        if cached:
            logits = head(hidden)
        else:
            vectors = plainly(encoder, texts(LABELS, 0), 10, head.own)
            vectors = vectors / vectors.norm(dim=-1, keepdim=True) if normalise else vectors
            logits = xhead.LazyLogits(hidden, vectors)
        rows = loss(logits, right_labels())
        found.append([rows.mean(), *torch.autograd.grad(rows.mean(), parameters)])
    for mine, exact in zip(*found, strict=True):
        assert relative_error(mine, exact) < 1e-10


@pytest.mark.parametrize("normalise", [False, True])
def test_documents_of_a_label_count_as_its_text_does(normalise):
    torch.manual_seed(0)
    encoder = Encoder(dropout=0.0).double()
    head = LabelEncoderHead(encoder, texts(LABELS, 0), chunk=10, normalise=normalise, own_vectors=SIZE).double()
    head.own.data.normal_()
    documents = encoder(**texts(ROWS, 1))
    documents = documents / documents.norm(dim=-1, keepdim=True) if normalise else documents
    members = torch.rand(LABELS, ROWS).double() < 0.1  # most labels have none or one, some have several
    head.set_documents(members.double() @ documents, members.sum(1).double())
    vectors = plainly(encoder, texts(LABELS, 0), 10)
    vectors = vectors / vectors.norm(dim=-1, keepdim=True) if normalise else vectors
    means = [torch.stack([one, *documents.detach()[own]]).mean(0) for one, own in zip(vectors, members, strict=True)]
    expected = torch.stack(means) + head.own
    expected = expected / expected.norm(dim=-1, keepdim=True) if normalise else expected
    assert members.any() and not members.any(1).all()
    upstream = torch.randn_like(expected)
    parameters = [*encoder.parameters(), head.own]
    found, exact = ([one, *torch.autograd.grad(one, parameters, upstream)] for one in (head.vectors(), expected))
    for mine, theirs in zip(found, exact, strict=True):
        assert relative_error(mine, theirs) < 1e-12


def test_documents_for_other_labels_are_refused():
    head = LabelEncoderHead(Encoder(), texts(LABELS, 0))
    with pytest.raises(ValueError, match=f"for each of the {LABELS} labels held here"):
        head.set_documents(torch.zeros(3, SIZE), torch.zeros(3))


def test_some_labels_are_rows_of_all():
    head = LabelEncoderHead(Encoder(dropout=0.0), texts(LABELS, 0), chunk=7)
    index = torch.tensor([3, 50, 3])
    assert torch.allclose(head.vectors(index), head.vectors()[index], atol=1e-6)
    with torch.no_grad():
        assert not head.vectors().requires_grad
    assert head(torch.randn(2, SIZE), index).shape == (2, 3)


def test_activations_are_those_of_a_chunk():
    encoder, inputs = Encoder(dropout=0.0, width=32), texts(4000, 0)
    beyond = {}
    for chunk in (100, 4000):
        head = LabelEncoderHead(encoder, inputs, chunk=chunk)
        head.vectors().sum().backward()

        def run(head=head):
            head.vectors().sum().backward()

        beyond[chunk] = peak_allocated(run)[0]
    assert beyond[100] < beyond[4000] / 4


@pytest.mark.parametrize(
    ("options", "message"),
    [({"chunk": 0}, "chunk must be at least 1"), ({"inputs": {}}, "one length"), ({"mask": 3}, "one length, a row a")],
)
def test_wrong_label_inputs(options, message):
    inputs = options.get("inputs", texts(LABELS, 0))
    if "mask" in options:
        inputs["mask"] = inputs["mask"][:3]
    with pytest.raises(ValueError, match=message):
        LabelEncoderHead(Encoder(), inputs, chunk=options.get("chunk", 4))


@pytest.mark.parametrize("name", ["decoupled_softmax", "infonce", "sigmoid", "asymmetric", "cce", "focal"])
@pytest.mark.parametrize("block", [10, 19, 100])
def test_a_backward_is_a_step_of_sgd(name, block):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(LABELS, SIZE, generator=generator, dtype=torch.float64)
    hidden = torch.randn(ROWS, SIZE, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = right_labels()[:, 0].clamp(min=0) if name in ("cce", "focal") else right_labels()
    options = {"temperature": 0.7} if name in ("decoupled_softmax", "infonce") else {}
    classifier = InPlaceClassifier(LABELS, SIZE, lr=0.3, weight_decay=0.1, dtype=torch.float64, block=block)
    classifier.weight.copy_(weight)
    plain = weight.clone().requires_grad_()
    for _ in range(2):  # the second step starts from what the first one left
        loss = get_loss(name, **options)
        expected = loss(xhead.LazyLogits(hidden, plain), labels).mean()
        hidden_grad, weight_grad = torch.autograd.grad(expected, (hidden, plain))
        found = loss(classifier(hidden), labels).mean()
        assert relative_error(found, expected) < 1e-12
        hidden.grad = None
        found.backward()
        assert relative_error(hidden.grad, hidden_grad) < 1e-10
        plain = ((1 - 0.03) * plain - 0.3 * weight_grad).detach().requires_grad_()
        assert relative_error(classifier.weight, plain) < 1e-12


def test_adaptive_steps_are_row_wise_adagrad():
    classifier = InPlaceClassifier(LABELS, SIZE, lr=0.3, dtype=torch.float64, block=19, adaptive=True)
    plain = torch.zeros(LABELS, SIZE, dtype=torch.float64, requires_grad=True)
    squares = torch.zeros(LABELS, dtype=torch.float64)
    loss = get_loss("decoupled_softmax")
    for seed in range(3):
        hidden = torch.randn(ROWS, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        (grad,) = torch.autograd.grad(loss(xhead.LazyLogits(hidden, plain), right_labels()).mean(), plain)
        loss(classifier(hidden), right_labels()).mean().backward()
        squares += grad.square().mean(1)
        plain = (plain - 0.3 * grad / squares.sqrt()[:, None]).detach().requires_grad_()
        assert relative_error(classifier.weight, plain) < 1e-10


def test_gradients_may_be_changed_before_the_step():
    classifier = InPlaceClassifier(LABELS, SIZE, lr=0.3, block=19, reduce=torch.Tensor.zero_)
    get_loss("sigmoid")(classifier(torch.randn(ROWS, SIZE)), right_labels()).sum().backward()
    assert not classifier.weight.any()


def test_all_labels_of_a_block_right():
    classifier = InPlaceClassifier(6, 2, lr=0.1, dtype=torch.float64, block=3)
    classifier.weight.normal_()
    hidden = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[0, 1, 2, -1, -1, -1], [0, 1, 2, 3, 4, 5]])
    rows = get_loss("decoupled_softmax")(classifier(hidden), labels)
    assert rows[1] == 0
    rows.sum().backward()
    assert hidden.grad.isfinite().all() and not hidden.grad[1].any()
    assert classifier.weight.isfinite().all()


def test_evaluation_takes_no_step():
    classifier = InPlaceClassifier(LABELS, SIZE, lr=0.3, block=10).eval()
    hidden = torch.randn(ROWS, SIZE, requires_grad=True)
    before = classifier.weight.clone()
    get_loss("sigmoid")(classifier(hidden), right_labels()).sum().backward()
    assert torch.equal(classifier.weight, before)
    assert list(classifier.parameters()) == [] and "weight" in classifier.state_dict()


def test_there_is_no_gradient_of_all_labels():
    labels, size = 40_000, 64
    classifier = InPlaceClassifier(labels, size, lr=0.1, block=2000)
    hidden = torch.randn(8, size, requires_grad=True)

    def run():
        get_loss("decoupled_softmax")(classifier(hidden), torch.zeros(8, 1, dtype=torch.int64)).sum().backward()

    run()
    assert peak_allocated(run)[0] < labels * size * 4 / 2


def test_bfloat16_steps_count_on_average():
    values = torch.full((200_000,), 1.001)
    rounded = stochastically_rounded(values)
    assert set(rounded.float().unique().tolist()) == {1.0, 1.0078125}
    assert abs(rounded.double().mean().item() - 1.001) < 1e-4
    assert torch.equal(
        stochastically_rounded(torch.tensor([1.5, -2.0, 0.0])), torch.tensor([1.5, -2.0, 0.0]).bfloat16()
    )
    classifier = InPlaceClassifier(1, 1024, lr=1e-3, dtype=torch.bfloat16)
    classifier.weight.fill_(1.0)
    hidden = torch.ones(1, 1024, requires_grad=True)
    for _ in range(50):
        get_loss("sigmoid")(classifier(hidden), torch.full((1, 1), -1)).sum().backward()
    assert classifier.weight.float().mean().item() == pytest.approx(0.95, abs=0.01)
    assert hidden.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be"),
        ({"lr": 0.1, "weight_decay": -1.0}, "weight_decay must be"),
        ({"lr": 0.1, "dtype": torch.float16}, "dtype must be torch.float64, torch.float32 or torch.bfloat16"),
        ({"lr": 0.1, "block": 0}, "labels, size and block must be at least 1"),
    ],
)
def test_wrong_classifier_options(options, message):
    with pytest.raises(ValueError, match=message):
        InPlaceClassifier(LABELS, SIZE, **options)


def test_statistics_that_blocks_do_not_have():
    classifier = InPlaceClassifier(LABELS, SIZE, lr=0.1)
    with pytest.raises(ValueError, match=r"has no variance: it can give lse, complement_lse"):
        classifier(torch.randn(2, SIZE)).statistics("variance")


def test_candidates_of_a_batch():
    labels = torch.tensor([[5, -1], [9, 2]])
    found = candidates(labels, torch.tensor([[9, 30], [-1, 0]]))
    assert found.index.tolist() == [0, 2, 5, 9, 30]
    assert found.labels.tolist() == [[2, -1], [3, 1]]
    drawn = random_negatives(100, 7, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == set(range(7))


def test_hard_negatives_are_the_best_of_the_wrong():
    queries, vectors = torch.randn(9, 4), torch.randn(30, 4)
    labels = torch.randint(-1, 30, (9, 3))
    found = hard_negatives(queries, vectors, labels, 5)
    for row, scores in enumerate(queries @ vectors.T):
        wrong = [i for i in scores.argsort(descending=True).tolist() if i not in labels[row].tolist()]
        assert found[row].tolist() == wrong[:5]
    few = hard_negatives(queries, vectors[:3], torch.tensor([[0, 1, 2]] * 9), 5)
    assert few.shape == (9, 5) and (few == -1).all()


def test_negatives_drawn_from_a_shortlist():
    shortlist = torch.tensor([[3, 1, 4, 5], [9, 2, -1, -1], [-1, -1, -1, -1]])
    seen = [set(), set(), set()]
    for seed in range(30):
        drawn = drawn_negatives(shortlist, 3, torch.Generator().manual_seed(seed))
        for row, (found, allowed) in enumerate(zip(drawn.tolist(), shortlist.tolist(), strict=True)):
            some = [label for label in found if label >= 0]
            assert len(found) == 3 and len(set(some)) == len(some) == min(3, sum(label >= 0 for label in allowed))
            seen[row] |= set(some)
    assert seen == [{1, 3, 4, 5}, {2, 9}, set()]
    assert drawn_negatives(shortlist, 6).shape == (3, 6)


def test_batches_of_near_queries():
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(8).repeat_interleave(16)
    vectors = 100 * torch.randn(8, 3, generator=generator)[group] + torch.randn(128, 3, generator=generator)
    batches = list(clustered_batches(vectors, 32, cluster=16, generator=generator))
    assert [len(batch) for batch in batches] == [32] * 4
    assert sorted(torch.cat(batches).tolist()) == list(range(128))
    assert all(len(group[batch].unique()) == 2 for batch in batches)
    odd = list(clustered_batches(vectors[:21], 8, generator=torch.Generator().manual_seed(0)))
    assert sorted(torch.cat(odd).tolist()) == list(range(21)) and [len(batch) for batch in odd] == [8, 8, 5]
    assert list(clustered_batches(vectors[:0], 8)) == []
    same = list(clustered_batches(torch.zeros(10, 3), 4))
    assert sorted(torch.cat(same).tolist()) == list(range(10))
