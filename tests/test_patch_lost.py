"""The ways in which a patch can be lost: each is mended, or raises with the fix."""

import types

import accelerate
import pytest
import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from torch import nn

import xhead
from tests.tiny import assert_same_step, tiny, tokens, twins
from xhead.projection import CutLinear
from xhead.standin import MaterializedWarning


def test_resized_vocabulary():
    plain, model = twins("LlamaForCausalLM", tie_word_embeddings=False)
    xhead.patch(model)
    for each in (plain, model):
        torch.manual_seed(5)
        each.resize_token_embeddings(104)
    assert type(model.lm_head) is nn.Linear
    assert_same_step(model, plain, tokens())
    assert type(model.lm_head) is CutLinear
    assert model.lm_head.out_features == 104


def test_new_linear_head():
    plain, model = twins("LlamaForCausalLM", tie_word_embeddings=False)
    xhead.patch(model)
    head = nn.Linear(32, 96, bias=True)
    plain.set_output_embeddings(head)
    model.set_output_embeddings(nn.Linear(32, 96, bias=True))
    model.lm_head.load_state_dict(head.state_dict())
    assert_same_step(model, plain, tokens())
    xhead.unpatch(model)
    assert type(model.lm_head) is nn.Linear


def test_new_head_of_another_kind():
    class Head(nn.Linear):
        def forward(self, input):
            return super().forward(input)

    model = xhead.patch(tiny("LlamaForCausalLM"))
    model.set_output_embeddings(Head(32, 96, bias=False))
    with pytest.raises(RuntimeError, match=r"patch of LlamaForCausalLM is lost.*Head.*xhead\.unpatch"):
        model(**tokens())
    with torch.no_grad():
        model(**tokens())


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "T5ForConditionalGeneration", "BertForMaskedLM"])
def test_forward_replaced_on_the_model(name):
    model = xhead.patch(tiny(name))

    def fused_forward(self, **batch):
        return type(self).forward(self, **batch)

    model.forward = types.MethodType(fused_forward, model)
    with pytest.raises(RuntimeError, match=r"has been replaced by .*fused_forward.*use_liger_kernel=False"):
        model(**tokens())
    # As an adapter calls it: past the model's own hooks.
    with pytest.raises(RuntimeError, match="use_liger_kernel=False"):
        model.forward(**tokens())


def test_forward_replaced_before_the_patch():
    model = tiny("LlamaForCausalLM")
    model.forward = types.MethodType(lambda self, **batch: None, model)
    with pytest.raises(RuntimeError, match="has been replaced by"):
        xhead.patch(model)
    assert type(model.lm_head) is nn.Linear


def test_wrapped_forward_is_no_loss():
    """accelerate wraps the forward of a model for mixed precision."""
    plain, model = twins("LlamaForCausalLM")
    xhead.patch(model)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.prepare_model(model)
    assert "forward" in vars(model)
    loss = model(**tokens()).loss
    torch.testing.assert_close(loss, plain(**tokens()).loss, rtol=2**-8, atol=0)
    assert (xhead.status(model).cut, xhead.status(model).materialized) == (1, 0)


def test_loss_that_leaves_the_head_out():
    class Bypassing(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 8)

        def get_output_embeddings(self):
            return self.head

        def forward(self, input, labels=None):
            return nn.functional.cross_entropy(self.body(input) @ self.head.weight.T, labels)

    model = xhead.patch(Bypassing())
    with pytest.raises(RuntimeError, match="computed a loss without calling its patched output projection"):
        model(torch.randn(3, 4), labels=torch.arange(3))


def test_replicas_of_data_parallel_give_real_logits():
    plain, model = twins("LlamaForCausalLM")
    xhead.patch(model)
    model.lm_head = model.lm_head._replicate_for_data_parallel()
    model.lm_head.weight, model.lm_head.bias = plain.lm_head.weight, None
    with pytest.warns(MaterializedWarning, match="`DataParallel` needs the logits.*accelerate launch"):
        out = model(**tokens())
    assert torch.equal(out.logits, plain(**tokens()).logits)
    assert torch.equal(out.loss, plain(**tokens()).loss)
    assert xhead.status(model).operations == {"DataParallel": 1}


@pytest.mark.parametrize("first", ["patch", "dispatch"])
def test_accelerate_hooks_on_the_head(first):
    plain, model = twins("LlamaForCausalLM", tie_word_embeddings=False)
    hook = accelerate.hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True)
    if first == "patch":
        xhead.patch(model)
    add_hook_to_module(model.lm_head, hook)
    assert "forward" in vars(model.lm_head)
    xhead.patch(model)
    assert_same_step(model, plain, tokens())
    xhead.unpatch(model)
    assert torch.equal(model(**tokens()).logits, plain(**tokens()).logits)
    xhead.patch(model)
    remove_hook_from_module(model.lm_head)
    assert_same_step(model, plain, tokens())
    assert torch.equal(xhead.unpatch(model)(**tokens()).logits, plain(**tokens()).logits)


def test_offloaded_head():
    """accelerate keeps the weights elsewhere, and loads them for the call of a module alone."""
    plain, model = twins("LlamaForCausalLM", tie_word_embeddings=False)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert model.lm_head.weight.device.type == "meta"
    xhead.patch(model)
    for each in (plain, model):
        each.requires_grad_(False)
    batch = tokens()
    embedded = [plain.get_input_embeddings()(batch["input_ids"]).requires_grad_() for _ in range(2)]
    losses = [
        each(inputs_embeds=e, labels=batch["labels"]).loss for each, e in zip((model, plain), embedded, strict=True)
    ]
    torch.testing.assert_close(*losses)
    gradients = [torch.autograd.grad(loss, e)[0] for loss, e in zip(losses, embedded, strict=True)]
    torch.testing.assert_close(*gradients)
    assert xhead.status(model).cut == 1
