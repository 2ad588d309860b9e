"""Losses that read the weight themselves, where two processes hold a half of it each."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import xhead
from tests.tiny import tokens, twins
from xhead.losses import alignment, distillation

RANKS = 2
VOCABULARY = 96


def _batch(seed):
    batch = tokens(seed=seed)
    labels = batch["labels"]
    return {**batch, "labels": torch.where(labels == -100, labels, labels % (VOCABULARY // 3))}


def _losses(model, teacher, batch):
    """The patched loss, and two functions of the model's lazy logits, added up."""
    found = model(**batch).loss
    logits, labels = model(input_ids=batch["input_ids"]).logits, batch["labels"]
    with torch.no_grad():
        theirs = teacher(input_ids=batch["input_ids"]).logits
    found = found + alignment.token_logprobs(logits, labels).mean()
    return found + distillation.reverse_kl(logits, theirs).mean()


def _train(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    torch.set_num_threads(1)
    try:
        mesh = init_device_mesh("cpu", (RANKS,))
        plain, model = twins("LlamaForCausalLM", tie_word_embeddings=False)
        assert plain.config.vocab_size == VOCABULARY
        whole_teacher, teacher = twins("LlamaForCausalLM", hidden_size=16)
        for each in (plain, model):
            xhead.patch(each, loss="subcenter_arcface")
        for each in (whole_teacher, teacher):
            xhead.patch(each, lazy_eval=True)
            each.requires_grad_(False)
        for seed in range(RANKS):
            (_losses(plain, whole_teacher, _batch(seed)) / RANKS).backward()
        fully_shard(model.lm_head, mesh=mesh, reshard_after_forward=True)
        fully_shard(model, mesh=mesh)
        fully_shard(teacher, mesh=mesh)
        _losses(model, teacher, _batch(rank)).backward()
        for (name, expected), actual in zip(plain.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(
                actual.grad.full_tensor(), expected.grad, rtol=1e-4, atol=1e-5,
                msg=lambda text, name=name: f"{name} {text}",
            )  # fmt: skip
        assert xhead.status(model).materialized == 0
        # A process that leaves while another still sends takes its threads away under it.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def test_two_processes(tmp_path):
    context = torch.multiprocessing.spawn(_train, args=(str(tmp_path),), nprocs=RANKS, join=False)
    assert context is not None
    while not context.join(timeout=120):
        pass
