"""Patched models against stock ones: loss, gradients, checkpoints, generation, and what cannot be patched."""

import copy
import os
import pickle

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import xhead
from tests import sweep
from tests.tiny import assert_same_gradients, assert_same_step, tiny, tokens, twins
from xhead.patch import Status
from xhead.projection import CutLinear
from xhead.standin import MaterializedWarning

# Unlike one another: how the head is called, what comes between it and the loss, who computes the loss.
SAMPLE = (
    "LlamaForCausalLM GPT2LMHeadModel Gemma2ForCausalLM CohereForCausalLM GraniteForCausalLM Qwen3ForCausalLM",
    "MixtralForCausalLM MambaForCausalLM BloomForCausalLM OPTForCausalLM BioGptForCausalLM GPTNeoXForCausalLM",
    "BartForCausalLM XLNetLMHeadModel WhisperForCausalLM EsmForMaskedLM BertForMaskedLM RobertaForMaskedLM",
    "ModernBertForMaskedLM ElectraForMaskedLM DistilBertForMaskedLM T5ForConditionalGeneration",
    "BartForConditionalGeneration PegasusForConditionalGeneration ProphetNetForConditionalGeneration",
    "LlavaForConditionalGeneration Qwen2VLForConditionalGeneration",
)


def test_unlike_classes():
    results = sweep.sweep(" ".join(SAMPLE).split())
    assert {name: result for name, result in results.items() if result[0] != "fused"} == {}
    assert len(results) >= 25


@pytest.mark.sweep
def test_every_class():
    results = sweep.sweep(sweep.classes())
    print(sweep.counts(results))
    by_kind = {kind: {name: why for name, (k, why) in results.items() if k == kind} for kind in sweep.KINDS}
    assert by_kind["wrong"] == {}
    assert by_kind["crashed"] == {}
    assert len(by_kind["fused"]) >= 257


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma2ForCausalLM", "BertForMaskedLM"])
def test_the_comparison_finds_a_small_error(name):
    assert sweep.compare(name)[0] == "fused"
    assert sweep.compare(name, spoil=1.001)[0] == "wrong"


@pytest.mark.parametrize("tied", [True, False])
def test_same_loss_and_gradients(tied):
    plain, model = twins("LlamaForCausalLM", tie_word_embeddings=tied)
    assert xhead.patch(model) is model
    assert_same_step(model, plain, tokens())
    batch = tokens()
    assert_same_step(model, plain, {**batch, "attention_mask": torch.ones_like(batch["input_ids"])})


def test_options_of_the_forward():
    plain, model = twins("LlamaForCausalLM")
    xhead.patch(model)
    batch = tokens()
    assert_same_step(model, plain, {**batch, "num_items_in_batch": 7})
    assert_same_step(model, plain, {**batch, "num_items_in_batch": torch.tensor(7)})
    assert_same_step(model, plain, {**batch, "logits_to_keep": 0})
    loss, logits = model(**batch, return_dict=False)[:2]
    torch.testing.assert_close(loss, plain(**batch).loss)
    assert isinstance(logits, xhead.LazyLogits)


def test_loss_of_logits_outside_the_model():
    plain, model = twins("LlamaForCausalLM")
    xhead.patch(model)
    ids = tokens()["input_ids"]
    for each in (plain, model):
        logits = each(ids).logits
        F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1)).backward()
    assert_same_gradients(model, plain)
    assert xhead.status(model).materialized == 0


def test_without_gradients_everything_is_stock():
    plain, model = twins("LlamaForCausalLM")
    xhead.patch(model)
    batch = tokens()
    with torch.no_grad():
        actual, expected = model(**batch), plain(**batch)
    assert torch.equal(actual.logits, expected.logits)
    assert torch.equal(actual.loss, expected.loss)
    with torch.inference_mode():
        assert type(model(**batch).logits) is torch.Tensor
    for options in ({}, {"do_sample": True}, {"num_beams": 3}):
        torch.manual_seed(3)
        actual = model.generate(batch["input_ids"], max_new_tokens=5, pad_token_id=0, **options)
        torch.manual_seed(3)
        assert torch.equal(actual, plain.generate(batch["input_ids"], max_new_tokens=5, pad_token_id=0, **options))
    assert xhead.status(model) == Status(patched=True, loss="cce")


def test_lazy_eval():
    plain, model = twins("LlamaForCausalLM")
    xhead.patch(model, lazy_eval=True)
    with torch.no_grad():
        out = model(**tokens())
        torch.testing.assert_close(out.loss, plain(**tokens()).loss)
        assert isinstance(out.logits, xhead.LazyLogits)
        assert torch.equal(out.logits.argmax(-1), plain(**tokens()).logits.argmax(-1))
        assert (xhead.status(model).cut, xhead.status(model).materialized) == (2, 0)
        greedy = {"max_new_tokens": 3, "pad_token_id": 0}
        ids = tokens()["input_ids"]
        assert torch.equal(model.generate(ids, **greedy), plain.generate(ids, **greedy))


def test_materialized_logits_are_the_stock_ones():
    plain, model = twins("Gemma2ForCausalLM")
    xhead.patch(model)
    logits = model(**tokens()).logits
    with pytest.warns(MaterializedWarning, match="`softmax` needs the logits themselves"):
        torch.testing.assert_close(logits.softmax(-1), plain(**tokens()).logits.softmax(-1))
    status = xhead.status(model)
    assert (status.cut, status.materialized, status.operations) == (1, 1, {"softmax": 1})


def test_a_loss_of_ones_own():
    plain, model = twins("Gemma2ForCausalLM")
    seen = []

    def focal(logits, labels):
        seen.append((logits.shape, labels.shape, labels.dtype))
        found = logits.statistics("lse", "target", target=labels)
        log_p = found.target - found.lse
        return -((1 - log_p.exp()) ** 2) * log_p

    xhead.patch(model, loss=focal)
    batch = tokens()
    logits, labels = plain(**batch).logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    log_p = logits.log_softmax(-1)[labels != -100].gather(1, labels[labels != -100][:, None])[:, 0]
    expected = (-((1 - log_p.exp()) ** 2) * log_p).mean()
    actual = model(**batch).loss
    torch.testing.assert_close(actual, expected)
    actual.backward()
    expected.backward()
    assert_same_gradients(model, plain)
    assert seen == [((18, 96), (18,), torch.int64)]
    assert xhead.status(model).loss is focal


def test_a_loss_that_returns_something_else():
    model = xhead.patch(tiny("LlamaForCausalLM"), loss=lambda logits, labels: logits.statistics("lse").lse.mean())
    with pytest.raises(ValueError, match=r"a loss must return one number a row, shape \(18,\), got \(\)"):
        model(**tokens())


def test_unpatch_leaves_nothing():
    plain, model = twins("LlamaForCausalLM")
    xhead.unpatch(xhead.patch(model))
    assert type(model.lm_head) is nn.Linear
    assert set(vars(model.lm_head)) == set(vars(plain.lm_head))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert torch.equal(model(**tokens()).loss, plain(**tokens()).loss)
    assert not xhead.status(model).patched
    with pytest.raises(ValueError, match="LlamaForCausalLM is not patched"):
        xhead.unpatch(model)


def test_patching_again():
    model = tiny("LlamaForCausalLM")
    xhead.patch(model)
    model(**tokens())
    assert xhead.patch(model, loss="cce") is model
    assert xhead.status(model).cut == 1
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    assert hooks == 2
    with pytest.raises(ValueError, match=r"already patched, with loss='cce', lazy_eval=False; got .*lazy_eval=True"):
        xhead.patch(model, lazy_eval=True)
    assert not xhead.status(model).lazy_eval
    xhead.patch(xhead.unpatch(model), lazy_eval=True)
    assert xhead.status(model).lazy_eval


def test_checkpoint_is_a_stock_one(tmp_path):
    plain, model = twins("LlamaForCausalLM", tie_word_embeddings=True)
    plain.save_pretrained(tmp_path / "plain")
    xhead.patch(model)
    model(**tokens()).loss.backward()
    model.save_pretrained(tmp_path / "patched")
    assert sorted(os.listdir(tmp_path / "patched")) == sorted(os.listdir(tmp_path / "plain"))
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "patched" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "patched")
    assert type(again.lm_head) is nn.Linear
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert again.config.architectures == ["LlamaForCausalLM"]
    assert list(model.state_dict()) == list(plain.state_dict())


def test_copies_are_patched_by_themselves(tmp_path):
    plain, model = twins("LlamaForCausalLM")
    xhead.patch(model)
    copied = copy.deepcopy(model)
    pickled = pickle.loads(pickle.dumps(model))
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for each in (copied, pickled, loaded):
        assert type(each.lm_head) is CutLinear
        assert_same_step(each, plain, tokens())
    assert xhead.status(model).cut == 0
    # A copy's hooks watch the copy.
    copied.lm_head = nn.Embedding(96, 32)
    with pytest.raises(RuntimeError, match="patch of LlamaForCausalLM is lost"):
        copied(**tokens())
    assert_same_step(model, plain, tokens())


def test_state_of_a_stock_model_loads():
    plain, model = twins("LlamaForCausalLM")
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.05)
    xhead.patch(model).load_state_dict(plain.state_dict())
    assert_same_step(model, plain, tokens())


@pytest.mark.parametrize("frozen", ["body", "head", "both"])
def test_frozen_parts(frozen):
    plain, model = twins("LlamaForCausalLM", tie_word_embeddings=False)
    for each in (plain, model):
        each.model.requires_grad_(frozen == "head")
        each.lm_head.requires_grad_(frozen == "body")
    xhead.patch(model)
    actual, expected = model(**tokens()).loss, plain(**tokens()).loss
    torch.testing.assert_close(actual, expected)
    assert actual.requires_grad == expected.requires_grad
    if actual.requires_grad:
        actual.backward()
        expected.backward()
    assert_same_gradients(model, plain)


def test_autocast():
    plain, model = twins("LlamaForCausalLM")
    xhead.patch(model)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = model(**tokens()), plain(**tokens())
    assert actual.logits.dtype == torch.bfloat16
    # Stock rounds the logits to bfloat16 (relative 2^-9), which the cut loss does not do.
    torch.testing.assert_close(actual.loss, expected.loss, rtol=2**-8, atol=0)
    actual.loss.backward()
    expected.loss.backward()
    assert_same_gradients(model, plain, rtol=0.05, atol=2e-3)


def test_bfloat16_model():
    plain, model = twins("BertForMaskedLM")
    xhead.patch(model)
    actual, expected = model.bfloat16()(**tokens()).loss, plain.bfloat16()(**tokens()).loss
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=2**-7, atol=0)


def test_hooks_on_the_head_fire_around_the_loss():
    model = tiny("LlamaForCausalLM")
    events = []
    model.lm_head.register_forward_pre_hook(lambda module, args: events.append("before"))
    model.lm_head.register_forward_hook(lambda module, args, out: events.append(type(out).__name__))
    xhead.patch(model)
    model(**tokens())
    assert events == ["before", "LazyLogits", "before", "Tensor"]


class WithoutHead(nn.Module):
    def get_output_embeddings(self):
        return None


class WithHead(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def get_output_embeddings(self):
        return self.head


class OtherLinear(nn.Linear):
    def forward(self, input):
        return super().forward(input) * 2


def _with_own_forward():
    linear = nn.Linear(4, 8)
    linear.forward = lambda input: input
    return linear


def _with_integers():
    linear = nn.Linear(4, 8)
    linear.weight = nn.Parameter(torch.zeros(8, 4, dtype=torch.int8), requires_grad=False)
    return linear


REFUSED = {
    "no module": (lambda: "llama", TypeError, r"model must be a torch\.nn\.Module, got str"),
    "no head": (WithoutHead, ValueError, "WithoutHead has no output projection"),
    "base model": (lambda: tiny("LlamaModel"), ValueError, "LlamaModel has no output projection"),
    "embedding": (lambda: WithHead(nn.Embedding(8, 4)), TypeError, r"is a torch\.nn\.modules\.sparse\.Embedding"),
    "several": (lambda: WithHead(nn.ModuleList([nn.Linear(4, 8)])), TypeError, "ModuleList"),
    "subclass": (lambda: WithHead(OtherLinear(4, 8)), TypeError, "OtherLinear.*quantised"),
    "own forward": (
        lambda: WithHead(_with_own_forward()),
        ValueError,
        "forward has been replaced on the module itself",
    ),
    "integers": (lambda: WithHead(_with_integers()), TypeError, r"a Parameter of torch\.int8"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_patched(name):
    make, error, message = REFUSED[name]
    model = make()
    before = {key: type(value) for key, value in model.named_modules()} if isinstance(model, nn.Module) else None
    with pytest.raises(error, match=message):
        xhead.patch(model)
    if before is not None:
        assert {key: type(value) for key, value in model.named_modules()} == before
        assert not xhead.status(model).patched


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": "cc"}, "unknown loss 'cc'; known are .*cce"),
        ({"head": "lineal"}, "unknown head 'lineal'; known are .*linear"),
        ({"label_smothing": 0.1}, "label_smothing"),
        ({"loss": 3}, "3"),
    ],
)
def test_wrong_arguments(arguments, message):
    model = tiny("LlamaForCausalLM")
    with pytest.raises((ValueError, TypeError), match=message):
        xhead.patch(model, **arguments)
    assert type(model.lm_head) is nn.Linear
    assert not model._forward_pre_hooks
