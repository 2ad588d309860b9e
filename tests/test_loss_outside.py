"""A loss of the logits that a model gives, taken outside of it, in two and four processes against one: DDP."""

import contextlib
import copy
import importlib.util
import os

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import xhead
from tests.processes import in_processes
from tests.test_trainer import train
from tests.tiny import tiny, tokens, twins

RANKS = [2, pytest.param(4, marks=pytest.mark.slow)]
DDP = {
    "DDP": {},
    "DDP that looks for parameters": {"find_unused_parameters": True},
    "DDP of a static graph": {"static_graph": True},
}


def loss_of(model, seed):
    """What the Trainer does with `compute_loss_func`: the model gives its logits, and they are asked twice."""
    batch = tokens(seed=seed)
    labels = batch.pop("labels")[:, 1:].flatten()
    logits = model(**batch).logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, labels, label_smoothing=0.1) + F.cross_entropy(logits, labels)


def plain_loss_of(model, seed):
    """As a head with a loss of its own is asked."""
    batch = tokens(seed=seed)
    labels = batch.pop("labels").flatten()
    return F.cross_entropy(model(**batch).logits.flatten(0, 1), labels)


def chunked_loss_of(model, seed):
    """Row by row, and forgotten until the backward."""
    batch = tokens(seed=seed)
    labels = batch.pop("labels")
    logits = model(**batch).logits
    losses = [checkpoint(F.cross_entropy, logits[i], labels[i], use_reentrant=False) for i in range(len(labels))]
    return sum(losses)


def gradients(model):
    found = {name: each.grad for name, each in model.named_parameters()}
    return {name: each.full_tensor() if isinstance(each, DTensor) else each for name, each in found.items()}


def assert_as_one_process(case, rank, ranks, wrapped, plain, loss=loss_of, steps=2):
    """Accumulated over steps, each reduced."""
    for step in range(steps):
        for seed in range(ranks):
            expected = loss(plain, ranks * step + seed)
            (expected / ranks).backward()
            if seed == rank:
                own = expected.detach()
        found = loss(wrapped, ranks * step + rank)
        torch.testing.assert_close(found.detach(), own, rtol=1e-5, atol=0, msg=lambda text: f"{case}: {text}")
        found.backward()
    assert_same_gradients(case, wrapped, plain)


def assert_same_gradients(case, wrapped, plain):
    expected = gradients(plain)
    for name, found in gradients(wrapped).items():
        name = name.removeprefix("module.")
        assert (found is None) == (expected[name] is None), (case, name)
        if found is not None:
            scale = expected[name].abs().max()
            assert (found - expected[name]).abs().max() <= 1e-5 * scale + 1e-8, (case, name)
    assert xhead.status(wrapped).materialized == 0, case


def ddp(rank, ranks):
    for name, options in DDP.items():
        for tied in (False, True):
            plain, model = twins("LlamaForCausalLM", tie_word_embeddings=tied)
            wrapped = DistributedDataParallel(xhead.patch(model), **options)
            assert_as_one_process((name, tied), rank, ranks, wrapped, plain, steps=3)


def ddp_looks(rank, ranks):
    """Where DDP looks for parameters: what a training may do besides."""

    def looking(model):
        return DistributedDataParallel(model, find_unused_parameters=True)

    plain, model = twins("LlamaForCausalLM", tie_word_embeddings=True)
    wrapped = looking(xhead.patch(model))
    for step in range(4):  # accumulated, reduced in every second
        for seed in range(ranks):
            (loss_of(plain, ranks * step + seed) / ranks).backward()
        with contextlib.nullcontext() if step % 2 else wrapped.no_sync():
            loss_of(wrapped, ranks * step + rank).backward()
    assert_same_gradients("accumulated", wrapped, plain)

    plain, model = twins("LlamaForCausalLM")
    wrapped = looking(xhead.patch(model))
    for seed in range(ranks):
        (loss_of(plain, seed) * loss_of(plain, seed + 7) / ranks).backward()
    (loss_of(wrapped, rank) * loss_of(wrapped, rank + 7)).backward()
    assert_same_gradients("two forwards", wrapped, plain)

    plain, model = twins("LlamaForCausalLM")
    wrapped = looking(xhead.patch(model))
    for seed in range(ranks):
        loss = loss_of(plain, seed) / ranks
        loss.backward(retain_graph=True)
        loss.backward()
    with wrapped.no_sync():  # DDP reduces at the first backward of a forward alone
        loss = loss_of(wrapped, rank)
    loss.backward(retain_graph=True)
    loss.backward()
    for each in wrapped.parameters():
        torch.distributed.all_reduce(each.grad.div_(ranks))
    assert_same_gradients("two backwards", wrapped, plain)

    plain, model = twins("LlamaForCausalLM")
    xhead.patch(model).train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_as_one_process("checkpointing", rank, ranks, looking(model), plain)

    plain, model = twins("LlamaForCausalLM")
    assert_as_one_process("chunked", rank, ranks, looking(xhead.patch(model)), plain, chunked_loss_of)

    for head, options in (("vq", {"codebook_size": 16, "start": "random"}), ("fourier", {"num_frequencies": 4})):
        pair = [xhead.patch(seeded(each), head=head, **options) for each in twins("LlamaForCausalLM")]
        assert_as_one_process(head, rank, ranks, looking(pair[1]), pair[0], plain_loss_of)

    plain, model = twins("T5ForConditionalGeneration")
    wrapped = looking(xhead.patch(model))
    assert_as_one_process("inside", rank, ranks, wrapped, plain, lambda model, seed: model(**tokens(seed=seed)).loss)


def seeded(model):
    torch.manual_seed(0)
    return model


class TwoOutputs(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.score = model, torch.nn.Linear(32, 1)

    def forward(self, **batch):
        found = self.model(**batch, output_hidden_states=True)
        return {"logits": found.logits, "score": self.score(found.hidden_states[0])}


def _loss_of_output(model, seed, use):
    batch = tokens(seed=seed)
    labels = batch.pop("labels").flatten()
    found = model(**batch)[use]
    return F.cross_entropy(found.flatten(0, 1), labels) if use == "logits" else found.sum()


def ddp_of_unused_outputs(rank, ranks):
    """Which gradients there are, and which stay None, is as with stock logits."""
    torch.manual_seed(0)
    start = TwoOutputs(tiny("LlamaForCausalLM").eval())
    for uses in (("logits", "score"), ("score", "logits"), ("score",)):
        plain, model = copy.deepcopy(start), copy.deepcopy(start)
        xhead.patch(model)
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        for step in range(4):
            use = uses[step % len(uses)]
            for seed in range(ranks):
                (_loss_of_output(plain, seed, use) / ranks).backward()
            _loss_of_output(wrapped, rank, use).backward()
        assert_same_gradients(uses, wrapped, plain)


ADAPTERS = ({"target_modules": ["q_proj"]}, {"target_modules": ["lm_head", "q_proj"]})
if importlib.util.find_spec("peft") is None:
    ADAPTERS = ()


def adapted(**form):
    import peft

    config = peft.LoraConfig(r=4, init_lora_weights=False, **form)
    pair = twins("LlamaForCausalLM", tie_word_embeddings=False)
    return [peft.get_peft_model(seeded(each), config).eval() for each in pair]


def ddp_of_adapters(rank, ranks):
    for form in ADAPTERS:
        plain, model = adapted(**form)
        wrapped = DistributedDataParallel(xhead.patch(model), find_unused_parameters=True)
        assert_as_one_process(form, rank, ranks, wrapped, plain)


def trainer(rank, ranks, folder):
    """The Trainer with label smoothing, and everything else as it is by default: DDP that looks for parameters."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1")
    curves, states = [], []
    for patch in (lambda model: model, xhead.patch):
        model = patch(tiny("LlamaForCausalLM").eval())
        trained, curve = train(
            model, folder, label_smoothing_factor=0.1, per_device_train_batch_size=2, gradient_accumulation_steps=2
        )
        assert trained.model_wrapped.find_unused_parameters
        curves.append(curve)
        states.append(model.state_dict())
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-5, atol=1e-5)
    for name, each in states[0].items():
        torch.testing.assert_close(states[1][name], each, rtol=1e-3, atol=1e-4)
    assert xhead.status(model).materialized == 0


def of_ddp(rank, ranks):
    ddp(rank, ranks)
    ddp_looks(rank, ranks)
    ddp_of_unused_outputs(rank, ranks)
    ddp_of_adapters(rank, ranks)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ranks", RANKS)
def test_as_one_process(ranks, tmp_path):
    in_processes(of_ddp, ranks, tmp_path, ranks)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ranks", RANKS)
def test_trainer_by_default(ranks, tmp_path):
    in_processes(trainer, ranks, tmp_path, ranks, str(tmp_path))
