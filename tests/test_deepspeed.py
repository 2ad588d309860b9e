"""A patched model under DeepSpeed's ZeRO, in two and four processes, against the stock one in a single process.

Nothing of ZeRO-3's parameters is left gathered by luck: a weight is there while its own module runs, and not besides.
"""

import copy
import importlib.util
import os

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState
from transformers import LlamaForCausalLM

import xhead
from tests.dense import relative_error
from tests.processes import in_forks
from tests.test_trainer import train
from tests.tiny import tiny, tokens, twins

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install 'xhead[deepspeed]'"
)
STEPS, MICRO_BATCHES, RATE = 2, 2, 0.5
ROWS = {2: ((1, 3), (3, 2)), 4: ((1, 3, 1, 2), (3, 2, 1, 1))}
"""Of each process, by their number, in each of the micro-batches whose gradients are accumulated."""

_NUMBERS = {"token_ids": list(range(10, 50)), "values": [each % 10 for each in range(10, 50)]}
CASES = {
    "tied": (True, {}),
    "untied": (False, {}),
    "number tokens": (False, {"loss": "cce+0.3*ntl_was", **_NUMBERS}),
    "vq": (False, {"head": "vq", "codebook_size": 12, "start": "random", "token_bias": "learned"}),
    "fourier": (False, {"head": "fourier", "num_frequencies": 5, "token_range": (10, 50), "init_scale": 1.0}),
}


def _deepspeed():
    """It compiles a shared memory all-reduce for CPUs when it is first asked for a process group; gloo has one."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    return deepspeed


def _config(stage, **changes):
    partitioned = {
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, **(partitioned if stage == 3 else {})},
        **changes,
    }


def _sgd(model):
    return torch.optim.SGD(model.parameters(), lr=RATE)


def _batch(step, ranks):
    """All rows of a step, and the part of them in each micro-batch of each process."""
    rows = ROWS[ranks]
    whole = tokens(rows=sum(map(sum, rows)), seed=step)
    whole["labels"][::2, :6] = -100
    whole["labels"][-rows[-1][-1] :] = -100  # nothing counts in the last process's last micro-batch
    starts = iter(torch.tensor([0, *(count for micro_batch in rows for count in micro_batch)]).cumsum(0).tolist())
    start = next(starts)
    parts = []
    for micro_batch in rows:
        parts.append([])
        for _ in micro_batch:
            stop = next(starts)
            parts[-1].append({name: each[start:stop] for name, each in whole.items()})
            start = stop
    return whole, parts


def _train(rank, ranks, deepspeed, stage, name):
    tied, options = CASES[name]
    plain, model = twins("LlamaForCausalLM", tie_word_embeddings=tied)
    if "head" in options or "loss" in options:
        torch.manual_seed(3)
        xhead.patch(plain, **options)
    torch.manual_seed(3)
    xhead.patch(model, **options)
    engine, *_ = deepspeed.initialize(model=model, optimizer=_sgd(model), config=_config(stage))
    optimizer = _sgd(plain)
    for step in range(STEPS):
        whole, parts = _batch(step, ranks)
        count = (whole["labels"][:, 1:] != -100).sum()
        expected = plain(**whole, num_items_in_batch=count).loss
        optimizer.zero_grad()
        expected.backward()
        found = torch.zeros(())
        for micro_batch in parts:
            loss = engine(**micro_batch[rank], num_items_in_batch=count).loss
            found += loss.detach()
            if stage == 3:
                assert all(each.numel() == 0 for each in model.parameters()), name
            engine.backward(loss * ranks, scale_wrt_gas=False)
            if micro_batch is parts[-1]:
                for (key, theirs), ours in zip(plain.named_parameters(), model.parameters(), strict=True):
                    gradient = deepspeed.utils.safe_get_full_grad(ours)
                    assert relative_error(gradient, theirs.grad) <= 1e-5, (stage, name, key)
            engine.step()  # counts micro-batches, and updates after the last
        dist.all_reduce(found)
        assert relative_error(found, expected) <= 1e-5, (stage, name)
        optimizer.step()
        for (key, theirs), ours in zip(plain.named_parameters(), model.parameters(), strict=True):
            parameter = deepspeed.utils.safe_get_full_fp32_param(ours)
            assert relative_error(parameter, theirs) <= 1e-5, (stage, name, key)
    status = xhead.status(model)
    assert (status.cut, status.materialized) == (STEPS * MICRO_BATCHES, 0), (stage, name, status)
    engine.destroy()


def _cases(rank, ranks):
    deepspeed = _deepspeed()
    for stage in (2, 3):
        for name in CASES:
            _train(rank, ranks, deepspeed, stage, name)


def _partitioned_from_the_start(rank, ranks, folder):
    """`from_pretrained` under ZeRO-3 never has a whole weight, unless asked for it."""
    deepspeed = _deepspeed()
    from transformers.integrations import HfDeepSpeedConfig

    plain = tiny("LlamaForCausalLM", tie_word_embeddings=False).eval()
    if rank == 0:
        plain.save_pretrained(f"{folder}/tiny")
    dist.barrier()
    config = _config(3, gradient_accumulation_steps=1)
    for name in ("untied", "vq", "fourier"):
        kept_alive = HfDeepSpeedConfig(config)
        model = LlamaForCausalLM.from_pretrained(f"{folder}/tiny").eval()
        assert model.lm_head.weight.numel() == 0
        del kept_alive
        expected = copy.deepcopy(plain)
        _, options = CASES[name]
        if "head" in options:
            with pytest.raises(ValueError, match=r"\(96, 32\), got \(0,\).*GatheredParameters"):
                xhead.patch(model, **options)
            assert not xhead.status(model).patched
        with deepspeed.zero.GatheredParameters(list(model.lm_head.parameters()), enabled="head" in options):
            for each in (expected, model):
                torch.manual_seed(3)
                xhead.patch(each, **options)
        engine, *_ = deepspeed.initialize(model=model, optimizer=_sgd(model), config=config)
        for seed in range(ranks):
            (expected(**tokens(seed=seed)).loss / ranks).backward()
        engine.backward(engine(**tokens(seed=rank)).loss)
        for (key, theirs), ours in zip(expected.named_parameters(), model.parameters(), strict=True):
            gradient = deepspeed.utils.safe_get_full_grad(ours)
            assert relative_error(gradient, theirs.grad) <= 1e-5, (name, key)
        engine.destroy()


def _trainer(rank, ranks, folder):
    """Accelerate starts no process group on CPUs for DeepSpeed, and takes one that is there."""
    _deepspeed()
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    for stage in (2, 3):
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState(backend="gloo")
        model = xhead.patch(tiny("LlamaForCausalLM").eval())
        auto = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
        trainer, curve = train(
            model,
            f"{folder}/{rank}",
            per_device_train_batch_size=4 // ranks,
            per_device_eval_batch_size=8 // ranks,
            gradient_accumulation_steps=2,
            optim="sgd",
            use_cpu=False,
            max_grad_norm=0.0,
            accelerator_config={"use_configured_state": True},
            deepspeed=_config(stage, **auto),
        )
        assert type(trainer.model_wrapped).__name__ == "DeepSpeedEngine"
        assert xhead.status(model).materialized == 0
        evaluated = trainer.evaluate()["eval_loss"]
        trainer.save_model(f"{folder}/{stage}")
        if rank == 0:
            torch.save((curve, evaluated), f"{folder}/{stage}.pt")


def _all(rank, ranks, folder):
    _cases(rank, ranks)
    _partitioned_from_the_start(rank, ranks, folder)
    _trainer(rank, ranks, folder)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_as_one_process(ranks, tmp_path):
    """The rows of the Trainer's processes, in a micro-batch of one process, count different tokens."""
    in_forks(_all, ranks, tmp_path, ranks, str(tmp_path))
    model = xhead.patch(tiny("LlamaForCausalLM").eval())
    options = {"per_device_eval_batch_size": 8, "gradient_accumulation_steps": 2, "optim": "sgd", "max_grad_norm": 0.0}
    trainer, expected = train(model, tmp_path, per_device_train_batch_size=4, **options)
    for stage in (2, 3):
        curve, evaluated = torch.load(tmp_path / f"{stage}.pt")
        torch.testing.assert_close(curve, expected, rtol=1e-5, atol=1e-5)
        assert evaluated == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)
        saved = LlamaForCausalLM.from_pretrained(tmp_path / str(stage)).state_dict()
        for name, parameter in model.state_dict().items():
            assert relative_error(saved[name], parameter) <= 1e-6, name
