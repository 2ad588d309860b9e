"""Labels shared by several processes: losses, gradients and steps are those of one process with all labels."""

import sys
import warnings
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

import xhead
from tests.dense import relative_error
from tests.processes import in_forks
from xhead.heads import InPlaceClassifier, LabelEncoderHead
from xhead.heads.label_batches import candidates, hard_negatives
from xhead.heads.label_shards import load_label_rows, save_label_rows
from xhead.losses import get_loss
from xhead.retrieval import topk

topk_module = sys.modules["xhead.retrieval.topk"]  # the package has a function of that name
LABELS, ROWS, SIZE, LENGTH = 23, 9, 6, 5
ALLOWED = {torch.float64: 1e-9, torch.float32: 1e-5}

# Labels of each process, and documents: uneven, with empty ones, and labels in another order than the ranks.
SPLITS = {
    2: [
        ([(0, 3), (3, 23)], [9, 0]),
        ([(0, 23), (0, 0)], [2, 7]),
        ([(12, 23), (0, 12)], [5, 4]),
    ],
    4: [([(0, 6), (6, 12), (12, 18), (18, 23)], [3, 2, 2, 2]), ([(0, 1), (1, 1), (20, 23), (1, 20)], [0, 4, 0, 5])],
}
LOSSES = {
    "decoupled_softmax": {"temperature": 0.5},
    "infonce": {"temperature": 0.5, "filter_eps": None},
    "sigmoid": {},
    "asymmetric": {},
    "soft_topk": {"k": (1, 3)},
    "mann_whitney": {"temperature": 0.5},
}
OF_BLOCKS = ("decoupled_softmax", "infonce", "sigmoid", "asymmetric")


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(40, 8)
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, SIZE))

    def forward(self, token_ids):
        assert len(token_ids)
        return self.layers(self.table(token_ids).sum(1))


def texts(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(40, (count, LENGTH), generator=generator)


def right_labels(ranges):
    """Each row has the last label of a shard, or the first, and others; one has none, one all."""
    labels = torch.randint(-1, LABELS, (ROWS, LABELS), generator=torch.Generator().manual_seed(2))
    labels[:, 4:] = -1
    held = [(start, stop) for start, stop in ranges if start < stop]
    for row in range(ROWS - 2):
        start, stop = held[row % len(held)]
        labels[row, 0] = stop - 1 if row % 3 else start
    labels[-2] = -1
    labels[-1] = torch.arange(LABELS)
    return labels


def model(dtype, own_vectors=True, vocabulary=None, normalise=True):
    torch.manual_seed(0)
    encoder = Encoder()
    rows = slice(0, LABELS) if vocabulary is None else vocabulary.own
    head = LabelEncoderHead(
        encoder,
        {"token_ids": texts(LABELS, 0)[rows]},
        chunk=4,
        normalise=normalise,
        own_vectors=SIZE if own_vectors else None,
        vocabulary=vocabulary,
    )
    if own_vectors:
        head.own.data.copy_(torch.randn(LABELS, SIZE, generator=torch.Generator().manual_seed(5))[rows])
    return encoder.to(dtype), head.to(dtype)


def own_documents(counts, rank):
    start = sum(counts[:rank])
    return slice(start, start + counts[rank])


def encoded(encoder, vocabulary, counts):
    """The whole batch, of which each process encodes its documents."""
    own = texts(ROWS, 1)[own_documents(counts, dist.get_rank())]
    vectors = encoder(own) if len(own) else encoder(texts(1, 1))[:0]
    return vocabulary.gather_rows(vectors, counts if counts[0] else None)


def summed(encoder):
    for parameter in encoder.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(parameter.grad)


def close(found, expected, dtype, what):
    assert found.shape == expected.shape, what
    assert relative_error(found, expected) < ALLOWED[dtype], (what, relative_error(found, expected))


def check_label_encoder(ranges, counts, dtype, index=None):
    vocabulary = xhead.Vocabulary(LABELS, *ranges[dist.get_rank()])
    labels = right_labels(ranges)
    if index is not None:
        index, labels = candidates(labels[:-1], index)
        labels = torch.cat([labels, torch.full_like(labels[:1], -1)])
    for name, options in LOSSES.items():
        loss = get_loss(name, **options)
        one_encoder, one = model(dtype)
        expected = loss(one(one_encoder(texts(ROWS, 1)), index), labels)
        encoder, head = model(dtype, vocabulary=vocabulary)
        hidden = encoded(encoder, vocabulary, counts)
        found = loss(head(hidden, index), labels)
        what = (name, ranges, counts)
        close(found, expected, dtype, what)
        for rows in (expected, found):
            rows.mean().backward()
        summed(encoder)
        for mine, theirs in zip(encoder.parameters(), one_encoder.parameters(), strict=True):
            close(mine.grad, theirs.grad, dtype, what)
        if head.held:
            mine = torch.zeros_like(head.own) if head.own.grad is None else head.own.grad
            theirs = one.own.grad[vocabulary.own]
            if theirs.any():
                close(mine, theirs, dtype, what)
            else:
                assert not mine.any(), what


def check_last_labels_of_shards(ranges):
    """Each as the only right one: the loss is the dense one's, and its logit is pushed up."""
    vocabulary = xhead.Vocabulary(LABELS, *ranges[dist.get_rank()])
    for label in sorted({stop - 1 for start, stop in ranges if start < stop}):
        generator = torch.Generator().manual_seed(label)
        hidden = torch.randn(1, SIZE, generator=generator, dtype=torch.float64)
        weight = torch.randn(LABELS, SIZE, generator=generator, dtype=torch.float64)
        own = weight[vocabulary.own].clone().requires_grad_()
        logits = xhead.LazyLogits(hidden, own, vocabulary=vocabulary)
        found = get_loss("decoupled_softmax")(logits, torch.tensor([[label]]))
        scores = hidden @ weight.T
        assert found.item() == pytest.approx((scores.logsumexp(1) - scores[0, label]).item(), rel=1e-12)
        (gradient,) = torch.autograd.grad(found.sum(), own)
        if vocabulary.start <= label < vocabulary.stop:
            assert (gradient @ hidden[0])[label - vocabulary.start] < 0


def check_equal_scores(ranges):
    """All processes take the same of equal logits for the largest."""
    vocabulary = xhead.Vocabulary(LABELS, *ranges[dist.get_rank()])
    weight = torch.ones(LABELS, SIZE, dtype=torch.float64)
    weight[::3] = 2.0
    loss, labels = get_loss("soft_topk", k=(1, 10)), right_labels(ranges)[:2]
    gradients = []
    for shared in (None, vocabulary):
        hidden = torch.ones(2, SIZE, dtype=torch.float64, requires_grad=True)
        own = weight if shared is None else weight[shared.own]
        rows = loss(xhead.LazyLogits(hidden, own, vocabulary=shared), labels)
        gradients.append((rows, *torch.autograd.grad(rows.sum(), hidden)))
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def check_no_right_labels(ranges):
    """In any row, and no rows at all."""
    vocabulary = xhead.Vocabulary(LABELS, *ranges[dist.get_rank()])
    weight = torch.randn(LABELS, SIZE, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for name, options in LOSSES.items():
        for rows in (3, 0):
            found = []
            for shared in (None, vocabulary):
                hidden = torch.ones(rows, SIZE, dtype=torch.float64, requires_grad=True)
                own = (weight if shared is None else weight[shared.own]).clone().requires_grad_()
                labels = torch.full((rows, 2), -1)
                losses = get_loss(name, **options)(xhead.LazyLogits(hidden, own, vocabulary=shared), labels)
                gradients = torch.autograd.grad(losses.sum(), (hidden, own))
                found.append((losses, gradients[0], gradients[1][vocabulary.own] if shared is None else gradients[1]))
            for expected, mine in zip(*found, strict=True):
                torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-12)


def check_classifier(ranges, counts, dtype, adaptive):
    vocabulary = xhead.Vocabulary(LABELS, *ranges[dist.get_rank()])
    labels = right_labels(ranges)
    common = {"lr": 0.3, "weight_decay": 0.1, "dtype": dtype, "adaptive": adaptive}
    for name in OF_BLOCKS:
        loss = get_loss(name, **LOSSES[name])
        one_encoder, encoder = model(dtype)[0], model(dtype)[0]
        one = InPlaceClassifier(LABELS, SIZE, block=50, **common)
        head = InPlaceClassifier(LABELS, SIZE, block=5, vocabulary=vocabulary, **common)
        for _ in range(2):
            expected = loss(one(one_encoder(texts(ROWS, 1))) / 0.7, labels)
            found = loss(head(encoded(encoder, vocabulary, counts)) / 0.7, labels)
            what = (name, ranges, counts, adaptive)
            close(found, expected, dtype, what)
            for encoding, rows in ((one_encoder, expected), (encoder, found)):
                encoding.zero_grad()
                rows.mean().backward()
            summed(encoder)
            if one.weight.any() and next(one_encoder.parameters()).grad.any():
                for mine, theirs in zip(encoder.parameters(), one_encoder.parameters(), strict=True):
                    close(mine.grad, theirs.grad, dtype, what)
            if len(head.weight):
                close(head.weight, one.weight[vocabulary.own], dtype, what)
                if adaptive:
                    close(head.squares, one.squares[vocabulary.own], dtype, what)


def check_search(ranges):
    vocabulary = xhead.Vocabulary(LABELS, *ranges[dist.get_rank()])
    generator = torch.Generator().manual_seed(3)
    queries = torch.randn(2, 4, SIZE, generator=generator)
    vectors = torch.randn(LABELS, SIZE, generator=generator)
    for k in (1, 5, LABELS):
        for order in (None, torch.neg):
            expected = topk(queries, vectors, k, order=order)
            with mock.patch.object(topk_module, "SCORES_AT_ONCE", 4 * k):
                found = topk(queries, vectors[vocabulary.own], k, order=order, block=4, vocabulary=vocabulary)
            assert torch.equal(found.classes, expected.classes)
            torch.testing.assert_close(found.scores, expected.scores)
    labels = right_labels(ranges)[: len(queries[0])]
    expected = hard_negatives(queries[0], vectors, labels, 3)
    assert torch.equal(hard_negatives(queries[0], vectors[vocabulary.own], labels, 3, vocabulary=vocabulary), expected)
    with pytest.raises(ValueError, match=f"k must be from 1 to the number of classes, {LABELS}, got {LABELS + 1}"):
        topk(queries, vectors[vocabulary.own], LABELS + 1, vocabulary=vocabulary)


def check_refusals():
    vocabulary = xhead.Vocabulary.even(LABELS)
    inputs = {"token_ids": texts(LABELS, 0)}
    message = (
        rf"those of the labels \[{vocabulary.start}, {vocabulary.stop}\) that this process holds, got {LABELS} rows"
    )
    with pytest.raises(ValueError, match=message):
        LabelEncoderHead(Encoder(), inputs, vocabulary=vocabulary)
    with pytest.raises(ValueError, match=f"labels must be those of the vocabulary, {LABELS}, got 7"):
        InPlaceClassifier(7, SIZE, lr=1.0, vocabulary=vocabulary)
    _, head = model(torch.float32, vocabulary=vocabulary)
    for index in ([3, 2], [2, 2]):
        with pytest.raises(ValueError, match="must be ascending, each label once"):
            head(torch.zeros(1, SIZE), torch.tensor(index))
    # Other labels in one process, of the classifier too.
    hidden, labels = torch.ones(2, SIZE), torch.full((2, 1), dist.get_rank())
    for logits in (head(hidden), InPlaceClassifier(LABELS, SIZE, lr=1.0, vocabulary=vocabulary)(hidden)):
        with pytest.raises(RuntimeError, match=r"the labels of rank \[1\] are not those of rank 0"):
            get_loss("sigmoid")(logits, labels)
    classifier = InPlaceClassifier(LABELS, SIZE, lr=1.0, vocabulary=xhead.Vocabulary.even(LABELS))
    with pytest.raises(RuntimeError, match="must compute the same loss of the same batch"):
        get_loss(("sigmoid", "infonce")[dist.get_rank()])(classifier(hidden), torch.zeros(2, 1, dtype=torch.int64))


def check_all(rank, processes):
    warnings.simplefilter("error", xhead.MaterializedWarning)
    for place, (ranges, counts) in enumerate(SPLITS[processes]):
        check_label_encoder(ranges, counts, torch.float64)
        check_last_labels_of_shards(ranges)
        if place < 2:  # the first uneven, the second with a process that holds none
            check_classifier(ranges, counts, torch.float64, adaptive=place == 0)
            check_label_encoder(ranges, counts, torch.float64, index=torch.tensor([0, 7, LABELS - 1]))
            check_search(ranges)
        if place == 0:
            check_label_encoder(ranges, counts, torch.float32)
            check_classifier(ranges, counts, torch.float32, adaptive=True)
        if place == 1:
            check_equal_scores(ranges)
            check_no_right_labels(ranges)
    if processes == 2:
        check_refusals()


def test_two_processes_share_the_labels(tmp_path):
    in_forks(check_all, 2, tmp_path, 2)


@pytest.mark.slow
def test_four_processes_share_the_labels(tmp_path):
    in_forks(check_all, 4, tmp_path, 4)


RANGES = {1: [(0, 23)], 2: [(20, 23), (0, 20)], 4: [(0, 6), (6, 12), (12, 12), (12, 23)], 5: [(0, 1), (1, 2), (2, 23)]}


@pytest.mark.parametrize(("saving", "loading"), [(2, 1), (1, 2), (2, 4), (4, 5)])
def test_label_rows_saved_and_loaded_by_other_numbers_of_processes(saving, loading, tmp_path):
    whole = {
        "vectors": torch.randn(LABELS, SIZE),
        "rounded": torch.randn(LABELS, 2, 3).bfloat16(),
        "squares": torch.rand(LABELS, dtype=torch.float64),
    }
    for start, stop in RANGES[saving]:
        rows = {name: tensor[start:stop] for name, tensor in whole.items()}
        save_label_rows(tmp_path, rows, start, stop, LABELS)
    for start, stop in RANGES[loading]:
        found = load_label_rows(tmp_path, start, stop)
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[name], whole[name][start:stop]) for name in whole)
    assert all(torch.equal(rows, whole[name]) for name, rows in load_label_rows(tmp_path).items())


def test_label_rows_that_are_not_whole(tmp_path):
    with pytest.raises(ValueError, match="must hold labels-START-STOP-of-LABELS.safetensors .* got no such file"):
        load_label_rows(tmp_path)
    save_label_rows(tmp_path, {"a": torch.zeros(3)}, 0, 3, 8)
    with pytest.raises(ValueError, match="without gap or overlap, .*labels-000000000-000000003-of-000000008"):
        load_label_rows(tmp_path)
    save_label_rows(tmp_path, {"a": torch.zeros(5)}, 3, 8, 8)
    with pytest.raises(ValueError, match=r"within the 8 labels of .*, got \[2, 9\)"):
        load_label_rows(tmp_path, 2, 9)
    save_label_rows(tmp_path, {"a": torch.zeros(6)}, 2, 8, 8)
    with pytest.raises(ValueError, match="without gap or overlap"):
        load_label_rows(tmp_path)
    with pytest.raises(ValueError, match=r"a must have the rows of the labels \[0, 2\), got \(3,\)"):
        save_label_rows(tmp_path, {"a": torch.zeros(3)}, 0, 2, 8)
