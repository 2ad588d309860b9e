"""Processes that share the classes: every statistic and loss, and all gradients, equal one process's."""

import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import xhead
from benchmarks.scaling import hidden_gradient, own_statistics
from tests.dense import relative_error
from tests.processes import GATHER, counted, in_processes
from tests.shared_classes import (
    ALLOWED,
    CLASSES,
    EDGES,
    check_cross_entropy,
    check_statistics,
    close,
    close_gradients,
    split,
)
from tests.statistic_case import Case
from tests.test_filter import language_like
from tests.test_losses import NEEDED
from xhead.engines import skipping
from xhead.losses import distillation, get_loss


def _check_collectives(vocabulary):
    vocabulary = xhead.Vocabulary(CLASSES, vocabulary.start, vocabulary.stop)  # one that has agreed on nothing yet
    rows, width = 12, 7
    case = Case(classes=CLASSES, rows=rows, size=width, dtype=torch.float32)
    own = split(vocabulary, *case.inputs)
    # argmax travels as two numbers of 4 bytes.
    for options, numbers in (({}, 2), ({"label_smoothing": 0.1, "return_lse": True, "return_accuracy": True}, 6)):
        for step in range(2):
            with counted() as forward:
                loss = xhead.linear_cross_entropy(
                    own[0], own[1], case.target, bias=own[2], vocabulary=vocabulary, **options
                )
            with counted() as backward:
                (loss[0] if options else loss).backward()
            told = [("all_gather_object", 0)] * (step == 0)
            assert forward == [*told, (GATHER, own_statistics(rows, numbers))], forward
            assert backward == [("all_reduce", hidden_gradient(rows, width, itemsize=4))], backward
    # A sum of losses: the hidden states' gradient is reduced once whatever is asked of them.
    logits = xhead.LazyLogits(*own, vocabulary=vocabulary)
    rows = get_loss("cce+0.3*ntl_was+0.1*lse_penalty", **NEEDED["ntl_was"])(logits, case.target)
    with counted() as backward:
        rows.sum().backward()
    assert backward == [("all_reduce", own[0].nbytes)], backward


def _check_dtensors(vocabulary, ranks):
    """A weight that is a DTensor, and hidden states that are split along their rows."""
    mesh = init_device_mesh("cpu", (ranks,))
    case = Case(classes=CLASSES, rows=8, size=7, dtype=torch.float64)
    whole = [each.detach().clone().requires_grad_() for each in case.inputs]
    whole[0] = whole[0].detach().view(2, 4, 7).requires_grad_()
    target = case.target.view(2, 4)
    expected = xhead.linear_cross_entropy(whole[0], whole[1], target, bias=whole[2])
    expected.backward()
    for placement in (None, Replicate(), Shard(1)):
        weight, bias = (distribute_tensor(each.detach(), mesh, [Shard(0)]).requires_grad_() for each in whole[1:])
        hidden = whole[0].detach().clone().requires_grad_()
        if placement is not None:
            hidden = distribute_tensor(hidden.detach(), mesh, [placement]).requires_grad_()
        for _ in range(2):
            for leaf in (hidden, weight, bias):
                leaf.grad = None
            with CommDebugMode() as forward:
                loss = xhead.linear_cross_entropy(hidden, weight, target, bias=bias)
            with CommDebugMode() as backward:
                loss.backward()
        sequences = placement == Shard(1)
        assert forward.get_total_counts() == 1 + sequences, (placement, forward.get_comm_counts())
        assert backward.get_total_counts() == 1, (placement, backward.get_comm_counts())
        assert sequences == any("reduce_scatter" in str(each) for each in backward.get_comm_counts())
        close(loss, expected, torch.float64, placement)
        for leaf, like in zip((hidden, weight, bias), whole, strict=True):
            gradient = leaf.grad
            assert placement is None or isinstance(gradient, DTensor)
            gradient = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            close(gradient, like.grad, torch.float64, placement)
    with pytest.raises(TypeError, match="split along its rows"):
        xhead.linear_cross_entropy(hidden, distribute_tensor(whole[1].detach(), mesh, [Shard(1)]), target)
    with pytest.raises(TypeError, match="leave vocabulary out"):
        xhead.linear_cross_entropy(whole[0], weight, target, vocabulary=vocabulary)


def _check_filter(rank):
    """Filtered on its own classes, the gradient is no further from the exact one than when filtered on all."""
    hidden, weight, target = language_like(rows=300, classes=4000)
    vocabulary = xhead.Vocabulary(4000, *[(0, 1500), (1500, 4000)][rank])
    gradients = []
    with skipping.always():
        for shared, eps in ((None, None), (None, 2**-8), (vocabulary, 2**-8)):
            rows = slice(None) if shared is None else shared.own
            leaves = [hidden.clone().requires_grad_(), weight[rows].clone().requires_grad_()]
            xhead.linear_cross_entropy(*leaves, target, filter_eps=eps, vocabulary=shared).backward()
            gradients.append((leaves[0].grad, leaves[1].grad if shared else leaves[1].grad[vocabulary.own]))
    for exact, one, own in zip(*gradients, strict=True):
        assert 1e-4 < relative_error(own, exact) < 1.1 * relative_error(one, exact)


WHOLE = ("apl", "subcenter_arcface")
"""Losses that no statistics give: the weight is gathered for them, and they say so."""

OTHERS = [
    ("apl", {"active": "nfl"}, False),
    ("ldr_kl", {"margin": 0.5}, False),
    ("aldr_kl", {"margin": 0.5, "steps": 40}, True),
    ("cosface", {"class_sample": 0.4, "seed": 1, "scale": 8.0}, False),
    ("subcenter_arcface", {"sub_centers": 11, "scale": 8.0}, False),
    ("cce", {"label_smoothing": 0.1, "filter_eps": None}, True),
    ("cce+0.3*ntl_was+0.2*ntl_number", {"reweigh": True, **NEEDED["ntl_was"]}, True),
    ("cce+0.1*zloss", {}, True),
]


def _losses():
    numbers = {name: NEEDED.get(name, {}) for name in xhead.list_losses()}
    cosines = ("cosface", "arcface", "adaface", "elasticface", "subcenter_arcface", "normalised_softmax", "sphereface2")
    for name, options in numbers.items():
        scale = {"scale": 8.0} if name in cosines else {}
        seed = {"seed": 0} if name == "elasticface" else {}
        yield name, {**options, **scale, **seed}, name not in cosines
    yield from OTHERS


def _check_losses(vocabulary, dtype):
    case = Case(classes=CLASSES, rows=10, size=7, dtype=dtype, peak=0.5)
    labels = case.target.clone()
    labels[:4] = torch.arange(2, 6)  # number tokens
    factor = torch.randn(10, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for name, options, with_bias in _losses():
        whole = [each.detach().clone().requires_grad_() for each in case.inputs]
        if not with_bias:
            whole[2] = None
        own = split(vocabulary, *whole)
        wanted = labels % (CLASSES // 11) if "sub_centers" in options and options["sub_centers"] > 1 else labels
        expected = get_loss(name, **options)(xhead.LazyLogits(*whole), wanted)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = get_loss(name, **options)(xhead.LazyLogits(*own, vocabulary=vocabulary), wanted)
        gathered = any("gathered" in str(warning.message) for warning in caught)
        no_statistic = name in WHOLE and (name != "apl" or "active" in options)
        assert gathered == no_statistic, name
        close(found, expected, dtype, name)
        for rows in (expected, found):
            (rows * factor).sum().backward()
        close_gradients(vocabulary, own, whole, dtype, (name, options))


def _check_logits(vocabulary):
    """What a model does to its logits: slices, per-class numbers, learned temperatures, and reading them."""
    dtype = torch.float64
    case = Case(classes=CLASSES, rows=10, size=7, dtype=dtype, peak=0.5)
    numbers = torch.randn(CLASSES, generator=torch.Generator().manual_seed(6), dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for change in (
            lambda o, each: o[:, :100],
            lambda o, each: o[2:, 5:120],
            lambda o, each: o * each[1] + each[0],
            lambda o, each: torch.tanh((o + each[0]) / 3.0) * 3.0,
            lambda o, each: torch.sigmoid(o) * 4.0,
            lambda o, each: o.softmax(-1) * 10.0,
        ):
            results = []
            for sharded in (False, True):
                extra = [numbers.clone().requires_grad_(), torch.tensor(1.3, dtype=dtype, requires_grad=True)]
                leaves = [each.detach().clone().requires_grad_() for each in case.inputs]
                if sharded:
                    leaves = split(vocabulary, *leaves)
                logits = xhead.LazyLogits(*leaves, vocabulary=vocabulary if sharded else None)
                logits = change(logits, extra)
                rows = logits.shape[0]
                loss = F.cross_entropy(logits, case.target[:rows] % logits.shape[1], label_smoothing=0.1)
                loss.backward()
                results.append((loss, leaves, extra))
            (expected, whole, theirs), (found, own, ours) = results
            close(found, expected, dtype, change)
            close_gradients(vocabulary, own, whole, dtype, change)
            for mine, other in zip(ours, theirs, strict=True):
                assert (mine.grad is None) == (other.grad is None)
                if other.grad is not None:
                    close(mine.grad, other.grad, dtype, change)
        # A low-rank adapter's projection added, which every process has whole.
        results = []
        for shared in (None, vocabulary):
            leaves = [each.detach().clone().requires_grad_() for each in case.inputs]
            leaves = leaves if shared is None else split(vocabulary, *leaves)
            adapter = [each.detach()[:, :3].clone().requires_grad_() for each in case.inputs[:2]]
            added = xhead.LazyLogits(leaves[0][:, :2] @ adapter[0][:2], adapter[1])
            logits = xhead.LazyLogits(*leaves, vocabulary=shared) + 0.5 * added
            loss = F.cross_entropy(logits, case.target)
            loss.backward()
            results.append((loss, leaves, adapter))
        close(results[1][0], results[0][0], dtype, "adapter")
        close_gradients(vocabulary, results[1][1], results[0][1], dtype, "adapter")
        for ours, theirs in zip(results[1][2], results[0][2], strict=True):
            close(ours.grad, theirs.grad, dtype, "adapter")
        # Reading the operands, as a loss of one's own may, and a divergence from a teacher that is not split.
        whole = [each.detach().clone().requires_grad_() for each in case.inputs]
        own = split(vocabulary, *whole)
        teacher = xhead.LazyLogits(case.hidden.detach()[:, :3], case.weight.detach()[:, :3])
        for leaves, shared in ((whole, None), (own, vocabulary)):
            logits = xhead.LazyLogits(*leaves, vocabulary=shared)
            loss = logits.hidden.square().sum() + logits.weight.pow(3).sum() + logits.bias.sin().sum()
            loss = loss + logits.class_logits(torch.tensor([120, 3, 60])).square().sum()
            (loss + distillation.reverse_kl(logits, teacher).sum()).backward()
        close_gradients(vocabulary, own, whole, dtype, "operands")


def _raises(kind, match, function):
    with pytest.raises(kind, match=match):
        function()
    dist.barrier()  # every process got here


def _check_bad_input(rank):
    for edges, classes, match in (
        ([(0, 5), (4, 10)], (10, 10), "4 belongs to two"),
        ([(0, 4), (5, 10)], (10, 10), r"\[4, 5\) belongs to no process.*rank 0 \[0, 4\), rank 1 \[5, 10\)"),
        ([(0, 4), (4, 9)], (10, 10), r"\[9, 10\) belongs to no process"),
        ([(0, 4), (4, 11)], (10, 10), "must lie within the 10 classes"),
        ([(0, 4), (4, 10)], (10, 11), "agree on the number of classes"),
        ([(0, 4), (4, 10.0)], (10, 10), "whole numbers"),
    ):
        _raises(ValueError, match, lambda e=edges, c=classes: xhead.Vocabulary(c[rank], *e[rank]))

    vocabulary = xhead.Vocabulary(10, *[(0, 4), (4, 10)][rank])
    size = vocabulary.stop - vocabulary.start

    def loss(hidden=torch.float32, weight=torch.float32, rows=size, target=0, length=6, **options):
        xhead.linear_cross_entropy(
            torch.ones(length, 3, dtype=hidden),
            torch.ones(rows, 3, dtype=weight),
            torch.full((length,), target),
            vocabulary=vocabulary,
            **options,
        )

    first = rank == 0
    differ = "they differ:\n  rank 0: .*\n  rank 1: "
    _raises(RuntimeError, differ, lambda: loss(label_smoothing=0.1 if first else 0.0))
    _raises(RuntimeError, differ, lambda: loss(softcap=3.0 if first else 4.0))
    _raises(RuntimeError, differ, lambda: loss(length=6 if first else 7))
    _raises(RuntimeError, differ, lambda: loss(weight=torch.float64 if first else torch.float32))
    wide = torch.float64 if first else torch.float32
    _raises(RuntimeError, differ, lambda: loss(hidden=wide, weight=wide))
    _raises(RuntimeError, differ, lambda: loss(rows=size + first))
    _raises(RuntimeError, "must be the . rows of the classes", lambda: loss(rows=1))
    _raises(IndexError, "target 10 is out of bounds: classes are 0 to 9", lambda: loss(target=10))
    _raises(RuntimeError, "same batch", lambda: loss(target=3 if first else 4))
    _raises(RuntimeError, "same batch", lambda: loss(target=10 if first else 4))
    loss()

    hidden, weight = torch.ones(6, 3), torch.ones(size, 3)
    labels = torch.zeros(6, dtype=torch.long)

    def patched(name, **options):
        logits = xhead.LazyLogits(hidden, weight, vocabulary=vocabulary)
        logits._record.loss = get_loss(name, **options)
        return F.cross_entropy(logits, labels)

    _raises(RuntimeError, differ, lambda: patched("focal", gamma=1.0 if first else 2.0))
    _raises(ValueError, "give it a seed", lambda: patched("elasticface"))
    _raises(ValueError, "give it a seed", lambda: patched("cosface", class_sample=0.5))


def _in_two(rank):
    for edges in EDGES[2]:
        vocabulary = xhead.Vocabulary(CLASSES, *edges[rank])
        for dtype in ALLOWED:
            check_statistics(vocabulary, dtype)
        check_cross_entropy(vocabulary, torch.float64)
    _check_collectives(vocabulary)
    _check_logits(vocabulary)
    _check_dtensors(vocabulary, 2)
    vocabulary = xhead.Vocabulary(CLASSES, *[(0, 44), (44, CLASSES)][rank])
    for dtype in ALLOWED:
        _check_losses(vocabulary, dtype)
    _check_filter(rank)
    _check_bad_input(rank)


def _in_four(rank):
    for edges in EDGES[4]:
        vocabulary = xhead.Vocabulary(CLASSES, *edges[rank])
        check_statistics(vocabulary, torch.float64)
        check_cross_entropy(vocabulary, torch.float32)
    _check_collectives(vocabulary)
    _check_dtensors(vocabulary, 4)


# All of a number of processes in one launch, since each process takes seconds to import everything.
@pytest.mark.parametrize(("ranks", "checks"), [(2, _in_two), (4, _in_four)])
def test_processes_that_share_the_classes(ranks, checks, tmp_path):
    in_processes(checks, ranks, tmp_path)
