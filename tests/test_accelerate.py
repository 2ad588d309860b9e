"""The configuration files for accelerate: what its own launcher reads in them, and the Trainer under what it reads.

accelerate shards on accelerators alone. What it does there is done here on a CPU, with a state that says that the
processes have accelerators; everything after that is accelerate's own and transformers'.
"""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import DistributedType, PartialState
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState
from recipe_support import launched_environment
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig

import xhead
from tests.processes import in_forks
from tests.test_trainer import train
from tests.tiny import tiny

FILES = Path(__file__).resolve().parents[1] / "recipes" / "accelerate"
RANKS = 2
TRAINING = {"gradient_accumulation_steps": 2, "optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.1}


CLAIMS = {
    "ddp": {},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"},
    "tensor_parallel": {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"},
}
CHOICES = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_PARALLELISM_CONFIG")


@pytest.mark.parametrize("name", CLAIMS)
def test_files_say_what_they_claim(name):
    config = load_config_from_file(str(FILES / f"{name}.yaml"))
    assert (config.num_processes, config.use_cpu) == (RANKS, False)
    environment = launched_environment(FILES / f"{name}.yaml")
    assert {key: environment.get(key) for key in CLAIMS[name]} == CLAIMS[name]
    assert not any(key in environment for key in CHOICES if key not in CLAIMS[name])


def test_every_file_is_tested():
    assert {path.stem for path in FILES.glob("*.yaml")} == set(CLAIMS)


def _launched(environment):
    AcceleratorState._reset_state(reset_partial_state=True)
    for key in [key for key in os.environ if key.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_"))]:
        del os.environ[key]
    os.environ.update(environment)
    PartialState(backend="gloo")
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def _train(model, folder, **changes):
    configured = {"accelerator_config": {"use_configured_state": True}, "use_cpu": False}
    trainer, curve = train(model, folder, **TRAINING, **configured, **changes)
    assert isinstance(model.lm_head.weight, DTensor)
    state = {
        name: each.full_tensor() if isinstance(each, DTensor) else each for name, each in model.state_dict().items()
    }
    return trainer, curve, state


def _sharded(rank, folder, environment):
    for tied in (False, True):
        _launched(environment)
        model = xhead.patch(tiny("LlamaForCausalLM", tie_word_embeddings=tied).eval())
        trainer, *found = _train(model, f"{folder}/{rank}", per_device_train_batch_size=2)
        assert trainer.accelerator.is_fsdp2
        assert xhead.status(model).materialized == 0
        if rank == 0:
            torch.save(found, f"{folder}/{tied}.pt")
        dist.barrier()
    # The Trainer takes the mean of each process's mean here, and asks the logits twice, outside the model.
    curves = []
    for patch in (lambda model: model, xhead.patch):
        _launched(environment)
        model = patch(tiny("LlamaForCausalLM").eval())
        curves.append(_train(model, f"{folder}/{rank}", label_smoothing_factor=0.1)[1])
    torch.testing.assert_close(*curves, rtol=1e-5, atol=1e-5)
    assert xhead.status(model).materialized == 0


def _split(rank, folder, environment):
    _launched(environment)
    model = LlamaForCausalLM.from_pretrained(f"{folder}/model", distributed_config=DistributedConfig(tp_plan="auto"))
    trainer, *found = _train(xhead.patch(model.eval()), f"{folder}/{rank}", per_device_train_batch_size=4)
    assert trainer.get_tp_size() == RANKS
    assert xhead.status(model).materialized == 0
    if rank == 0:
        torch.save(found, f"{folder}/False.pt")


def _assert_as_one_process(tied, folder):
    curve, state = torch.load(folder / f"{tied}.pt")
    model = xhead.patch(tiny("LlamaForCausalLM", tie_word_embeddings=tied).eval())
    _, expected = train(model, folder, per_device_train_batch_size=4, **TRAINING)
    torch.testing.assert_close(curve, expected, rtol=1e-5, atol=1e-5)
    for name, parameter in model.state_dict().items():
        torch.testing.assert_close(state[name], parameter, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n} {text}")


@pytest.mark.filterwarnings("ignore")
def test_fsdp2(tmp_path):
    """Layers, and a group of the last norm and the head: two processes of two rows are one of four."""
    in_forks(_sharded, RANKS, tmp_path, str(tmp_path), launched_environment(FILES / "fsdp2.yaml"))
    for tied in (False, True):
        _assert_as_one_process(tied, tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_tensor_parallel(tmp_path):
    """Both processes have the same rows, and half of the classes each."""
    tiny("LlamaForCausalLM", tie_word_embeddings=False).save_pretrained(tmp_path / "model")
    in_forks(_split, RANKS, tmp_path, str(tmp_path), launched_environment(FILES / "tensor_parallel.yaml"))
    _assert_as_one_process(False, tmp_path)
