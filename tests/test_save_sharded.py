"""A patched model that several processes hold in parts is saved, and another number of them loads the same bits."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import LlamaForCausalLM

import xhead
from tests.processes import in_forks
from tests.tiny import tiny, tokens

CLASSES = 61
"""Odd, so that the shards of two and of four processes are uneven."""

HEADS = {
    "linear": {"loss": "cce"},
    "vq": {"head": "vq", "codebook_size": 12, "start": "random", "token_bias": "learned"},
    "fourier": {"head": "fourier", "num_frequencies": 5, "token_range": (10, 40)},
}


def _model(seed, options):
    torch.manual_seed(seed)
    model = tiny("LlamaForCausalLM", tie_word_embeddings=False, vocab_size=CLASSES)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1 * (1 + seed))
    torch.manual_seed(3)  # what a head draws once belongs to the model
    return xhead.patch(model, **options)


def _sharded(model):
    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def _shared_classes(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model.lm_head.weight = nn.Parameter(distribute_tensor(model.lm_head.weight, mesh, [Shard(0)]))
    return model


def _full(state):
    return {name: each.full_tensor() if isinstance(each, DTensor) else each for name, each in state.items()}


def _whole_optimizer(model, optimizer):
    state = get_state_dict(model, optimizer)[1]["state"]
    return {f"{name}.{key}": value for name, own in state.items() for key, value in _full(own).items()}


def _after_a_step(seed, split, options):
    """A model and its optimizer, which has something to save."""
    model = split(_model(seed, options))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)
    model(**tokens()).loss.backward()
    optimizer.step()
    return model, optimizer


def _save(rank, folder, split, options):
    model, optimizer = _after_a_step(0, split, options)
    state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": state, "optimizer": optimizer_state}, checkpoint_id=f"{folder}/saved")
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    whole_optimizer = _whole_optimizer(model, optimizer)
    if rank == 0:
        torch.save((whole, whole_optimizer), f"{folder}/whole.pt")
        # What a model of one process saves, from the gathered tensors.
        xhead_model = _model(1, options)
        xhead_model.save_pretrained(f"{folder}/exported", state_dict=whole)


def _load(rank, folder, split, options):
    model, optimizer = _after_a_step(1, split, options)
    state, optimizer_state = get_state_dict(model, optimizer)
    dcp.load({"model": state, "optimizer": optimizer_state}, checkpoint_id=f"{folder}/saved")
    set_state_dict(model, optimizer, model_state_dict=state, optim_state_dict=optimizer_state)
    whole, whole_optimizer = torch.load(f"{folder}/whole.pt")
    found = _full(model.state_dict())
    assert found.keys() == whole.keys()
    for name, expected in whole.items():
        assert torch.equal(found[name], expected), name
    moments = _whole_optimizer(model, optimizer)
    assert moments.keys() == whole_optimizer.keys()
    for name, expected in whole_optimizer.items():
        assert torch.equal(moments[name], expected), name
    assert model(**tokens()).loss.isfinite()


def _each(rank, folder, function, cases):
    for name, split, options in cases:
        function(rank, f"{folder}/{name}", split, options)


CASES = [
    ("sharded", _sharded, HEADS["linear"]),
    ("sharded-vq", _sharded, HEADS["vq"]),
    ("sharded-fourier", _sharded, HEADS["fourier"]),
    ("classes", _shared_classes, HEADS["linear"]),
]


@pytest.mark.parametrize(("saving", "loading"), [(2, (1, 4)), (1, (2,)), (4, (2,))])
@pytest.mark.filterwarnings("ignore")
def test_another_number_of_processes(saving, loading, tmp_path):
    for name, *_ in CASES:
        (tmp_path / name).mkdir()
    for ranks in (saving, *loading):
        (tmp_path / str(ranks)).mkdir()
    in_forks(_each, saving, tmp_path / str(saving), str(tmp_path), _save, CASES)
    for ranks in loading:
        in_forks(_each, ranks, tmp_path / str(ranks), str(tmp_path), _load, CASES)
    for name, _, options in CASES:
        whole, _ = torch.load(tmp_path / name / "whole.pt")
        exported = load_file(tmp_path / name / "exported" / "model.safetensors")
        assert exported.keys() == whole.keys()
        assert all(torch.equal(exported[key], whole[key]) for key in whole)
        folder = tmp_path / name / "exported"
        if options.get("head"):
            model = xhead.load(folder)
        else:
            model = LlamaForCausalLM.from_pretrained(folder)
        found = model.state_dict()
        assert all(torch.equal(found[key], whole[key]) for key in whole)
