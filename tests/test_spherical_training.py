"""The spherical head in training loops that are not its own: optimisers, accelerate, the stock Trainer."""

import copy

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.dense import relative_error
from tests.spherical_definitions import squared_error, target_matrix, z_loss
from xhead.heads import SphericalHead
from xhead.trainer import AttachHead

CLASSES, SIZE, FEATURES = 60, 8, 5


class Model(nn.Module):
    """A layer and a head: the spherical one, or a dense weight with the loss from its definition."""

    def __init__(self, spherical, definition=squared_error, name="mse", **options):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(FEATURES, SIZE)
        weight = 0.2 * torch.randn(CLASSES, SIZE)
        self.definition = definition
        self.head = SphericalHead(SIZE, CLASSES, name, weight=weight, **options) if spherical else None
        self.weight = None if spherical else nn.Parameter(weight)

    def forward(self, features, labels, num_items_in_batch=None):
        hidden = self.body(features)
        if self.head is not None:
            return {"loss": self.head(hidden, labels, num_items_in_batch=num_items_in_batch)}
        rows = self.definition(hidden @ self.weight.T, target_matrix(labels[:, None], CLASSES, dtype=hidden.dtype))
        return {"loss": rows.mean() if num_items_in_batch is None else rows.sum() / num_items_in_batch}

    def dense(self):
        return self.weight if self.head is None else self.head.dense()


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {
            "features": torch.randn(FEATURES, generator=generator),
            "labels": torch.randint(CLASSES, (), generator=generator),
        }


def batch(start, count=8):
    items = [Rows()[index] for index in range(start, start + count)]
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def assert_same(spherical, plain, tolerance=1e-5):
    assert relative_error(spherical.dense(), plain.dense()) < tolerance
    assert relative_error(spherical.body.weight, plain.body.weight) < tolerance


def test_sgd_with_a_schedule_and_decay():
    models = [Model(True, z_loss, "zloss"), Model(False, z_loss)]
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=2.0, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
        if model.head is not None:
            model.head.attach(optimizer)
        for step in range(12):
            optimizer.zero_grad()
            model(**batch(step))["loss"].backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.2)
            optimizer.step()
            schedule.step()
    assert_same(*models)


def test_a_group_of_its_own_beside_adam():
    models = [Model(True), Model(False)]
    for model in models:
        body = {"params": list(model.body.parameters())}
        if model.head is not None:
            optimizer = torch.optim.AdamW([body, {"params": model.head.parameters(), "lr": 1e-4}], 1e-3)
            model.head.attach(optimizer, rate_factor=100.0)
        else:
            optimizer = torch.optim.AdamW([body], 1e-3)
            sgd = torch.optim.SGD([model.weight], 1e-2, weight_decay=0.01)
        for step in range(6):
            optimizer.zero_grad()
            model.zero_grad()
            model(**batch(step))["loss"].backward()
            optimizer.step()
            if model.head is None:
                sgd.step()
    assert_same(*models)
    assert models[0].head.proxy == 0


def test_a_reloaded_optimiser_and_detach():
    head = SphericalHead(SIZE, CLASSES)
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
    head.attach(optimizer)
    head.attach(optimizer)
    hidden, labels = torch.randn(4, SIZE), torch.arange(4)
    optimizer.load_state_dict({**optimizer.state_dict(), "param_groups": [
        {**optimizer.state_dict()["param_groups"][0], "lr": 0.5}
    ]})  # fmt: skip
    twin = copy.deepcopy(head)
    for each in (head, twin):
        each(hidden, labels).backward()
    optimizer.step()
    twin.step(0.5)
    assert torch.equal(head.dense(), twin.dense())
    head.detach()
    head.detach()
    head(hidden, labels).backward()
    optimizer.step()
    assert torch.equal(head.dense(), twin.dense())


def test_optimisers_that_do_not_fit():
    head = SphericalHead(SIZE, CLASSES)
    parameters = list(head.parameters())
    with pytest.raises(
        ValueError, match=r"learning rate 0.001 of its group is meant for AdamW: give attach\(.*rate_fac"
    ):
        head.attach(torch.optim.AdamW(parameters, 1e-3))
    with pytest.raises(ValueError, match="meant for SGD with momentum"):
        head.attach(torch.optim.SGD(parameters, 1e-3, momentum=0.9))
    with pytest.raises(ValueError, match=r"does not hold the head's proxy: give it head.parameters\(\)"):
        head.attach(torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1))
    for optimizer in (torch.optim.Adam, torch.optim.SGD):
        held = [*parameters, head.weight.factor]
        with pytest.raises(
            ValueError, match=f"{optimizer.__name__} holds the head's factor, which only the head itself"
        ):
            head.attach(optimizer(held, 1e-3), rate_factor=1.0)
    with pytest.raises(ValueError, match="maximize=True"):
        head.attach(torch.optim.SGD(parameters, 0.1, maximize=True))
    with pytest.raises(TypeError, match=r"must be a torch.optim.Optimizer, got str"):
        head.attach("sgd")


def test_more_than_one_process_is_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(
        RuntimeError, match="made for one process, got 2: make it with process_group=torch.distributed.group.WORLD"
    ):
        SphericalHead(SIZE, CLASSES).step(0.1)


def test_gradient_scaler_scales_and_skips():
    models = [Model(True), Model(False)]
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        if model.head is not None:
            model.head.attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for step in range(6):
            optimizer.zero_grad()
            loss = model(**batch(step))["loss"]
            scaler.scale(loss * (float("inf") if step == 3 else 1.0)).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
    assert_same(*models)


def test_accelerate_accumulates(tmp_path):
    from accelerate import Accelerator

    models = [Model(True), Model(False)]
    for model in models:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
        prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01))
        if model.head is not None:
            model.head.attach(optimizer)
        for step in range(12):
            with accelerator.accumulate(prepared):
                accelerator.backward(prepared(**batch(4 * step, 4))["loss"])
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
                before = model.dense().clone()
                optimizer.step()
                optimizer.zero_grad()
                assert torch.equal(before, model.dense()) == (step % 3 != 2)
    assert_same(*models)


def arguments(folder, **changes):
    defaults = {
        "per_device_train_batch_size": 4, "max_steps": 8, "learning_rate": 1e-2, "logging_steps": 1, "report_to": [],
        "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False,
        "gradient_accumulation_steps": 2, "remove_unused_columns": False,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **{**defaults, **changes})


class WithSGD(Trainer):
    def create_optimizer(self, model=None):
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=self.args.learning_rate)
        return self.optimizer


def train(model, folder, cls=WithSGD, attach=None, resume=None, **changes):
    trainer = cls(model=model, args=arguments(folder, **changes), train_dataset=Rows())
    if model.head is not None:
        trainer.add_callback(attach or AttachHead(model.head))
    trainer.train(resume_from_checkpoint=resume)
    return torch.tensor([[entry["loss"], entry["grad_norm"]] for entry in trainer.state.log_history if "loss" in entry])


def test_trainer(tmp_path):
    """Accumulation, clipping at 1, a linear schedule: losses and gradient norms as those of the dense model."""
    models = [Model(True), Model(False)]
    curves = [train(model, tmp_path) for model in models]
    torch.testing.assert_close(*curves, rtol=1e-4, atol=1e-5)
    assert_same(*models)


def test_trainer_resumes(tmp_path):
    whole, parts = Model(True), Model(True)
    expected = train(whole, tmp_path / "whole")
    options = {"save_strategy": "steps", "save_steps": 4}
    train(parts, tmp_path / "parts", **options)
    again = Model(True)
    found = train(again, tmp_path / "parts", resume=str(tmp_path / "parts" / "checkpoint-4"), **options)
    torch.testing.assert_close(found[-4:], expected[-4:])
    assert torch.equal(again.dense(), whole.dense())


def test_trainer_with_its_own_optimiser_needs_a_rate_factor(tmp_path):
    model = Model(True)
    with pytest.raises(ValueError, match="meant for AdamW"):
        train(model, tmp_path, cls=Trainer)
    before = model.dense()
    curve = train(model, tmp_path, cls=Trainer, attach=AttachHead(model.head, rate_factor=1.0), max_steps=2)
    assert len(curve) == 2 and not torch.equal(model.dense(), before)
    assert issubclass(AttachHead, TrainerCallback)
