"""PEFT adapters around a patched model, and on its head."""

import copy

import pytest
import torch

import xhead
from tests.tiny import assert_same_gradients, tiny, tokens

peft = pytest.importorskip("peft")

# PEFT reads an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def adapted(model, **options):
    torch.manual_seed(2)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=12, init_lora_weights=False, **options))
    return model.eval()


FORMS = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "head": {"target_modules": ["lm_head"]},
    "head and body": {"target_modules": ["lm_head", "q_proj"], "lora_dropout": 0.1},
    "rank-stabilised": {"target_modules": ["lm_head"], "use_rslora": True},
    "head with bias": {"target_modules": ["lm_head"], "lora_bias": True},
}


@pytest.mark.parametrize("when", ["before", "after", "inside"])
@pytest.mark.parametrize("form", FORMS)
def test_adapters(form, when):
    base = tiny("LlamaForCausalLM", tie_word_embeddings=False)
    if form == "head with bias":
        base.lm_head = torch.nn.Linear(32, 96)
    plain = adapted(copy.deepcopy(base), **FORMS[form])
    if when == "before":
        xhead.patch(base)
    model = adapted(base, **FORMS[form])
    if when == "after":
        xhead.patch(model)
    elif when == "inside":
        xhead.patch(model.get_base_model())
    actual, expected = model(**tokens()).loss, plain(**tokens()).loss
    torch.testing.assert_close(actual, expected)
    actual.backward()
    expected.backward()
    assert_same_gradients(model, plain)
    if "head" in form:
        trained = [p for name, p in model.named_parameters() if "lm_head" in name and p.requires_grad]
        assert trained
        assert all(p.grad is not None and p.grad.any() for p in trained)
    status = xhead.status(model)
    assert (status.cut, status.materialized) == (1, 0)


def test_softcap_over_an_adapted_head():
    base = tiny("Gemma2ForCausalLM", tie_word_embeddings=False)
    plain = adapted(copy.deepcopy(base), target_modules=["lm_head"])
    model = xhead.patch(adapted(base, target_modules=["lm_head"]))
    actual, expected = model(**tokens()).loss, plain(**tokens()).loss
    torch.testing.assert_close(actual, expected)
    actual.backward()
    expected.backward()
    assert_same_gradients(model, plain)
    assert xhead.status(model).materialized == 0


def test_adapters_off_merged_and_unloaded():
    base = tiny("LlamaForCausalLM", tie_word_embeddings=False)
    plain = adapted(copy.deepcopy(base), target_modules=["lm_head"])
    model = xhead.patch(adapted(base, target_modules=["lm_head"]))
    with model.disable_adapter(), plain.disable_adapter():
        torch.testing.assert_close(model(**tokens()).loss, plain(**tokens()).loss)
    with torch.no_grad():
        assert torch.equal(model(**tokens()).logits, plain(**tokens()).logits)
    model, plain = model.merge_and_unload(), plain.merge_and_unload()
    torch.testing.assert_close(model(**tokens()).loss, plain(**tokens()).loss)
    assert (xhead.status(model).cut, xhead.status(model).materialized) == (2, 0)
    assert type(xhead.unpatch(model).lm_head) is torch.nn.Linear


def test_adapter_checkpoint(tmp_path):
    model = xhead.patch(adapted(tiny("LlamaForCausalLM", tie_word_embeddings=False), target_modules=["lm_head"]))
    model(**tokens()).loss.backward()
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    again = peft.PeftModel.from_pretrained(tiny("LlamaForCausalLM", tie_word_embeddings=False), tmp_path).eval()
    torch.testing.assert_close(again(**tokens()).loss, model(**tokens()).loss)


def test_low_precision_base():
    """PEFT keeps adapters in float32 beside a bfloat16 base."""
    base = tiny("LlamaForCausalLM", tie_word_embeddings=False).bfloat16()
    plain = adapted(copy.deepcopy(base), target_modules=["lm_head"])
    model = xhead.patch(adapted(base, target_modules=["lm_head"]))
    assert model.get_output_embeddings().lora_B["default"].weight.dtype == torch.float32
    actual, expected = model(**tokens()).loss, plain(**tokens()).loss
    torch.testing.assert_close(actual, expected, rtol=2**-8, atol=0)
    actual.backward()
    expected.backward()
    assert_same_gradients(model, plain, rtol=0.05, atol=5e-3)


@pytest.mark.parametrize("options", [{"use_dora": True}])
def test_other_adapters_on_the_head_are_right_and_say_so(options):
    base = tiny("LlamaForCausalLM", tie_word_embeddings=False)
    plain = adapted(copy.deepcopy(base), target_modules=["lm_head"], **options)
    model = xhead.patch(adapted(base, target_modules=["lm_head"], **options))
    with pytest.warns(xhead.standin.MaterializedWarning):
        actual = model(**tokens()).loss
    expected = plain(**tokens()).loss
    torch.testing.assert_close(actual, expected)
    actual.backward()
    expected.backward()
    assert_same_gradients(model, plain)
    assert xhead.status(model).materialized > 0


def test_unpatch_of_an_adapted_head():
    model = adapted(tiny("LlamaForCausalLM", tie_word_embeddings=False), target_modules=["lm_head"])
    kinds = [type(module) for module in model.modules()]
    xhead.unpatch(xhead.patch(model))
    assert [type(module) for module in model.modules()] == kinds
