"""The spherical head over several processes: the steps of one process on the whole batch, at an exchange without V."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.dense import relative_error
from tests.processes import in_forks, in_processes
from tests.spherical_definitions import MEMBERS, target_matrix
from xhead.exchange import Exchange
from xhead.heads import SphericalHead
from xhead.heads.label_shards import load_label_rows, save_label_rows
from xhead.vocabulary import even_shards

CLASSES, SIZE = 61, 6


def _head(name="zloss", classes=CLASSES, dtype=torch.float64, **options):
    generator = torch.Generator().manual_seed(5)
    weight = 0.3 * torch.randn(classes, SIZE, generator=generator, dtype=torch.float64) + 0.2
    return SphericalHead(SIZE, classes, name, weight=weight, dtype=dtype, process_group=dist.group.WORLD, **options)


class Batch:
    """The rows of all processes, and which are this one's."""

    def __init__(self, sizes, targets, seed):
        generator = torch.Generator().manual_seed(seed)
        count = sum(sizes)
        self.hidden = torch.randn(count, SIZE, generator=generator, dtype=torch.float64)
        self.labels = torch.randint(CLASSES, (count, targets), generator=generator)
        self.labels[count // 2 :] = self.labels[: count - count // 2].clone()
        if targets > 1:
            self.labels[0, 1] = -100
        rank = dist.get_rank()
        self.mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        self.share = count / len(sizes)  # a sum over this process's rows by it is the whole batch's mean, on average


def _compare(name, options, definition, sizes, targets, steps=12, rate=0.05, **more):
    """Steps of the sharded head beside those of SGD on a dense weight and the whole batch."""
    head = _head(name, **options, stabilise_every=3, refresh_every=5, **more)
    weight = head.dense().requires_grad_()
    optimizer = torch.optim.SGD([weight], rate, weight_decay=0.1)
    for step in range(steps):
        batch = Batch(sizes, targets, seed=step)
        hidden, whole = batch.hidden[batch.mine].clone().requires_grad_(), batch.hidden.clone().requires_grad_()
        expected = definition(whole @ weight.T, target_matrix(batch.labels, CLASSES), **options)
        rows = head(hidden, batch.labels[batch.mine], reduction="none")
        assert relative_error(rows, expected[batch.mine]) < 1e-11
        (rows.sum() / batch.share).backward()
        expected.mean().backward()
        assert relative_error(hidden.grad, len(sizes) * whole.grad[batch.mine]) < 1e-9
        assert relative_error(head.grad_norm(), weight.grad.norm()) < 1e-9
        head.step(rate, 0.1)
        optimizer.step()
        optimizer.zero_grad()
        assert relative_error(head.dense(), weight) < 1e-9
    assert relative_error(head.weight.covariance, torch.cov(weight.T, correction=0)) < 1e-9
    return head, weight.detach()


def _check_prediction(head, weight, sizes):
    batch = Batch(sizes, 1, seed=99)
    hidden, labels = batch.hidden[batch.mine], batch.labels[batch.mine][:, 0]
    scores = hidden @ weight.T
    key = head.loss.order(scores)
    for k in (1, 7, len(weight)):
        best = head.topk(hidden, k)
        assert torch.equal(best.classes, key.topk(k).indices)
        torch.testing.assert_close(best.scores, scores.gather(1, best.classes))
    places = 1 + (key > key.gather(1, labels[:, None])).sum(1)
    for ties in ("worst", "mean", "best"):
        assert torch.equal(head.ranks(hidden, labels, ties=ties, block=5).long(), places)
    some = torch.arange(len(hidden) * 4).reshape(-1, 4) % len(weight)
    torch.testing.assert_close(head.scores(hidden, some), scores.gather(1, some))
    assert relative_error(head.to_linear().weight, weight) < 1e-9
    if head.loss.is_likelihood:
        found = -head.loss.rows(
            scores.mean(1), scores.var(1, correction=0), scores.gather(1, labels[:, None]), len(weight)
        )
        torch.testing.assert_close(head.log_probability(hidden, labels), found)


def _check_micro_batches():
    whole, split = _head(), _head()
    first, second = Batch([2, 3], 1, seed=1), Batch([4, 0], 3, seed=2)
    for batch in (first, second):
        (split(batch.hidden[batch.mine], batch.labels[batch.mine], reduction="sum") / 3).backward()
    rows = [batch.hidden[batch.mine] for batch in (first, second)]
    padded = [nn.functional.pad(first.labels[first.mine], (0, 2), value=-100), second.labels[second.mine]]
    whole(torch.cat(rows), torch.cat(padded), num_items_in_batch=3).backward()
    assert relative_error(split.grad_norm(), whole.grad_norm()) < 1e-12
    for head in (whole, split):
        head.step(2.0, 0.01)
    assert relative_error(split.dense(), whole.dense()) < 1e-12


def _check_state(rank, folder):
    def train(head, seeds):
        for seed in seeds:
            batch = Batch([3, 4], 2, seed)
            head(batch.hidden[batch.mine].to(head.weight.core.dtype), batch.labels[batch.mine]).backward()
            head.step(1.0, 1e-3)
            head.zero_grad()

    head, other = (_head(dtype=torch.float32, stabilise_every=3) for _ in range(2))
    train(head, range(5))
    assert set(dict(head.named_buffers())) == {"inverse_temperature"}
    torch.save(head.state_dict(), f"{folder}/head-{rank}.pt")
    other.load_state_dict(torch.load(f"{folder}/head-{rank}.pt"))
    for each in (head, other):
        train(each, range(5, 10))
    for name, value in head.state_dict().items():
        assert torch.equal(value.nan_to_num(), other.state_dict()[name].nan_to_num()), name
    before = other.dense()
    dist.barrier()
    theirs, here = (rf"\(rank {each} of 2\)" for each in (1 - rank, rank))
    with pytest.raises(RuntimeError, match=f"holds classes .*{theirs}, here are .*{here}"):
        other.load_state_dict(torch.load(f"{folder}/head-{1 - rank}.pt"))
    assert torch.equal(other.dense(), before)
    assert other.double().weight.factor.dtype == torch.float64
    twin = copy.deepcopy(head)
    for each in (head, twin):
        train(each, [10])
    assert torch.equal(twin.dense(), head.dense())
    with pytest.raises(TypeError, match=r"cannot be pickled: save the state_dict\(\) of every rank"):
        pickle.dumps(head)
    moved = SphericalHead.from_linear(head.to_linear(), process_group=dist.group.WORLD, shards=[1, CLASSES - 1])
    assert relative_error(moved.dense(), head.dense()) < 1e-6


def _check_errors(rank):
    """What is wrong in one process raises in both, and the head goes on."""
    wrong = {
        "out_features must be the same on all ranks, got 61 on rank 0 and 62": {"classes": CLASSES + rank},
        "dtype must be the same on all ranks": {"dtype": (torch.float32, torch.float64)[rank]},
        r"loss must be the same.*sharpness=1\.0.*sharpness=2\.0": {"sharpness": 1.0 + rank},
        r"shards must be the same.*\[31, 30\].*\[30, 31\]": {"shards": [31 - rank, 30 + rank]},
        "refresh_every must be the same on all ranks, got 10 on rank 0 and 11": {"refresh_every": 10 + rank},
        "stabilise_every must be at least 1, got 0": {"stabilise_every": 1 - rank},
        "shards must be 2 numbers of classes, one a process, that add up to 61, got": {"shards": [61] * (2 - rank)},
    }
    for message, options in wrong.items():
        with pytest.raises(ValueError, match=message):
            _head(**options)
    with pytest.raises(ValueError, match="got 5 classes and 6 features"):
        SphericalHead(SIZE, 5, process_group=dist.group.WORLD)
    head = _head()
    hidden, labels = torch.randn(3, SIZE, dtype=torch.float64), torch.tensor([0, 1, 2])
    before = head.dense()
    out = labels + 59 * rank
    for call in (lambda: head(hidden, out), lambda: head.ranks(hidden, out), lambda: head.scores(hidden, out[:, None])):
        with pytest.raises(IndexError, match=("^on rank 1: " if rank == 0 else "") + r"\w+ 61 is out of bounds"):
            call()
    with pytest.raises(RuntimeError, match=r"hidden must be floating and \(..., 6\)"):
        head(hidden[:, rank:], labels)
    with pytest.raises(ValueError, match="k must be the same on all ranks, got 3 on rank 0 and 4 on rank 1"):
        head.topk(hidden, 3 + rank)
    with pytest.raises(RuntimeError, match=r"no scores of all classes: use topk"):
        head(hidden)
    with pytest.raises(RuntimeError, match="all classes in one process"):
        head.fit_temperature(hidden, labels)
    head(hidden, labels).backward()
    with pytest.raises(ValueError, match=r"learning_rate must be the same on all ranks, got 1\.0 on rank 0 and 2\.0"):
        head.step(1.0 + rank)
    if rank:
        head.scale_gradient(0.0)
    with pytest.raises(
        ValueError, match=r"gradient's scale must be the same on all ranks, got 1\.0 on rank 0 and 0\.0"
    ):
        head.step(1.0)
    assert torch.equal(head.dense(), before)
    head.zero_grad()
    head(hidden * (1 if rank else torch.nan), labels).backward()
    with pytest.raises(RuntimeError, match="norm is nan: the head is left as it was"):
        head.step(1.0)
    assert torch.equal(head.dense(), before)


def _check_exchange(monkeypatch):
    """How many numbers go between the processes in a step: the same for 61 classes and for 2,000."""
    sent = []
    for name in ("gather", "add_up"):
        plain = getattr(Exchange, name)

        def counting(self, tensor, *given, plain=plain):
            sent.append(tensor.numel())
            return plain(self, tensor, *given)

        monkeypatch.setattr(Exchange, name, counting)
    totals = []
    for classes in (CLASSES, 2000):
        head = _head(classes=classes)
        sent.clear()
        batch = Batch([3, 3], 1, seed=0)
        head(batch.hidden[batch.mine], batch.labels[batch.mine]).backward()
        head.step(0.1)
        totals.append(sum(sent))
    assert totals[0] == totals[1] < 6 * SIZE + 3 * (2 * SIZE + 4) + 4


def _check_data_parallel():
    """Body and head under DistributedDataParallel and SGD, with clipping: the dense model on the whole batch."""
    body = nn.Linear(4, SIZE, dtype=torch.float64)
    plain = nn.Linear(4, SIZE, dtype=torch.float64)
    plain.load_state_dict(body.state_dict())
    model = nn.Sequential(body, _head("mse"))
    weight = model[1].dense().requires_grad_()

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = model

        def forward(self, features, labels):
            return self.head(self.body(features), labels)

    parallel = DistributedDataParallel(Loss())
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.02, weight_decay=0.01)
    model[1].attach(optimizer)
    dense = torch.optim.SGD([*plain.parameters(), weight], lr=0.02, weight_decay=0.01)
    for step in range(8):
        generator = torch.Generator().manual_seed(step)
        features = torch.randn(8, 4, generator=generator, dtype=torch.float64)
        labels = torch.randint(CLASSES, (8, 1), generator=generator)
        mine = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
        parallel(features[mine], labels[mine]).backward()
        MEMBERS[0][2](plain(features) @ weight.T, target_matrix(labels, CLASSES)).mean().backward()
        norms = [
            nn.utils.clip_grad_norm_(parameters, 3.0)
            for parameters in (parallel.parameters(), [*plain.parameters(), weight])
        ]
        assert relative_error(*norms) < 1e-9
        for each in (optimizer, dense):
            each.step()
            each.zero_grad()
    assert relative_error(model[1].dense(), weight) < 1e-9
    assert relative_error(body.weight, plain.weight) < 1e-9


def _check_trainer(folder, expected):
    from tests.test_spherical_training import Model, train

    model = Model(True, process_group=dist.group.WORLD)
    curve = train(model, folder)
    torch.testing.assert_close(model.dense(), expected["dense"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.body.weight.detach(), expected["body"], rtol=1e-4, atol=1e-5)
    if dist.get_rank() == 0:
        torch.testing.assert_close(curve, expected["curve"], rtol=1e-4, atol=1e-5)


def _two(rank, folder, expected):
    for name, options, definition in (MEMBERS[0], MEMBERS[2], MEMBERS[3]):
        head, weight = _compare(name, options, definition, [3, 5], 1 if name == "zloss" else 3, rate=0.02)
        _check_prediction(head, weight, [4, 2])
    _compare("zloss", {}, MEMBERS[1][2], [0, 5], 1)
    _compare("zloss", {}, MEMBERS[1][2], [40, 10], 2, steps=4)  # more rows than features
    _check_micro_batches()
    _check_state(rank, folder)
    _check_errors(rank)
    with pytest.MonkeyPatch.context() as monkeypatch:
        _check_exchange(monkeypatch)
    _check_data_parallel()
    _check_trainer(folder, expected)


def test_two_processes(tmp_path):
    from tests.test_spherical_training import Model, train

    plain = Model(False)
    curve = train(plain, tmp_path, per_device_train_batch_size=8)
    expected = {"curve": curve, "dense": plain.weight.detach(), "body": plain.body.weight.detach()}
    in_processes(_two, 2, tmp_path, str(tmp_path), expected)


def _three(rank):
    """Uneven shards, one of them empty; and a group of some of the processes."""
    for sizes in ([2, 3, 4], [0, 1, 0]):
        head, weight = _compare("log_taylor", {}, MEMBERS[3][2], sizes, 2, steps=4, shards=[40, 0, 21])
        _check_prediction(head, weight, sizes)
    group = dist.new_group([0, 2])
    if rank == 1:
        with pytest.raises(ValueError, match="not in the process group"):
            SphericalHead(SIZE, CLASSES, process_group=group)
        return
    head = SphericalHead(SIZE, CLASSES, process_group=group)
    rows = head.weight.factor
    assert len(rows) == 31 - rank // 2 and not torch.equal(rows[:30], head.dense()[31 * (1 - rank // 2) :][:30])


def test_three_processes(tmp_path):
    in_processes(_three, 3, tmp_path)


def _rows_at(ranks, rank, folder):
    first = sum(even_shards(CLASSES, ranks)[:rank])
    return load_label_rows(folder, first, first + even_shards(CLASSES, ranks)[rank])["weight"]


def _save_rows(rank, folder):
    shards = [50, 11, 0, 0][: dist.get_world_size()]
    head = SphericalHead(SIZE, CLASSES, process_group=dist.group.WORLD, bias=True, shards=shards, dtype=torch.float64)
    for _ in range(3):
        head(torch.randn(4, SIZE, dtype=torch.float64), torch.randint(CLASSES, (4,))).backward()
        head.step(0.05)
    place = head.weight.place
    save_label_rows(folder / "rows", {"weight": head.weight.own_rows()}, place.start, place.stop, place.classes)
    if rank == 0:
        torch.save(head.dense(), folder / "whole.pt")
    else:
        head.dense()


def _load_rows(rank, folder):
    rows = _rows_at(dist.get_world_size(), rank, folder / "rows")
    head = SphericalHead(SIZE, CLASSES, process_group=dist.group.WORLD, bias=True, weight=rows)
    assert torch.equal(head.weight.own_rows(), rows)
    torch.testing.assert_close(head.dense(), torch.load(folder / "whole.pt"), rtol=0, atol=0)
    with pytest.raises(ValueError, match=rf"weight must be \({CLASSES}, {SIZE + 1}\) or \({len(rows)}, "):
        SphericalHead(SIZE, CLASSES, process_group=dist.group.WORLD, bias=True, weight=rows[1:])


@pytest.mark.parametrize(("saving", "loading"), [(2, 4), (4, 2)])
def test_rows_saved_by_other_processes(saving, loading, tmp_path):
    in_forks(_save_rows, saving, tmp_path, tmp_path)
    (tmp_path / "store").unlink()
    in_forks(_load_rows, loading, tmp_path, tmp_path)
    alone = SphericalHead(SIZE, CLASSES, bias=True, weight=load_label_rows(tmp_path / "rows")["weight"])
    assert torch.equal(alone.dense(), torch.load(tmp_path / "whole.pt"))


def test_without_processes():
    with pytest.raises(RuntimeError, match="needs torch.distributed.init_process_group"):
        SphericalHead(SIZE, CLASSES, process_group=object())
