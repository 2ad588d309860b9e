"""Heads that take the projection's place: patch, train, generate, save, load, adapt, and how such a patch is lost."""

import copy
import json
import pickle
from dataclasses import dataclass

import accelerate
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import xhead
from tests.tiny import tiny, tokens
from xhead import guard, heads
from xhead.heads.base import Head, HeadLogits
from xhead.patch import Status
from xhead.standin import MaterializedWarning

CLASSES = ["LlamaForCausalLM", "GPT2LMHeadModel", "BertForMaskedLM", "T5ForConditionalGeneration"]
# A class that reads its head's dtype, one that initialises it from outside, one that adds a bias of zeros.
OTHERS = ["MambaForCausalLM", "ModernBertForMaskedLM", "BartForConditionalGeneration"]


@dataclass(frozen=True)
class LowRankConfig:
    rank: int = 8

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")


class LowRankHead(Head):
    """`o = up (down h)`: simple enough to be compared with, and with nothing of V rows named weight."""

    def __init__(self, in_features, out_features, config):
        super().__init__(in_features, out_features)
        self.down = nn.Parameter(torch.empty(config.rank, in_features).normal_(std=0.1))
        self.up = nn.Parameter(torch.empty(out_features, config.rank).normal_(std=0.1))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def start_from(self, projection, *, factor: float = 1.0):
        rank = self.up.shape[1]
        left, values, right = torch.linalg.svd(projection.weight.detach().double(), full_matrices=False)
        with torch.no_grad():
            self.up.copy_(factor * left[:, :rank] * values[:rank])
            self.down.copy_(right[:rank])

    def logits(self, hidden):
        return F.linear(F.linear(hidden, self.down.to(hidden.dtype)), self.up.to(hidden.dtype))

    def loss_rows(self, hidden, labels):
        self.calls += 1
        return F.cross_entropy(self.logits(hidden), labels, reduction="none")


@pytest.fixture(autouse=True)
def _low_rank():
    heads.register_head("low_rank", LowRankConfig)(LowRankHead)
    yield
    del heads._REGISTRY["low_rank"]


def patched(name="LlamaForCausalLM", rank=8, **changes):
    return xhead.patch(tiny(name, **changes).eval(), head="low_rank", rank=rank)


def head_of(model):
    return model.get_output_embeddings()


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_are_those_of_the_head(name, tied):
    model = patched(name, tie_word_embeddings=tied)
    embedding = model.get_input_embeddings().weight
    assert embedding.shape[0] == head_of(model).out_features
    loss = model(**tokens()).loss
    loss.backward()
    actual = {key: value.grad for key, value in model.named_parameters()}
    model.zero_grad()
    guard.unwatch(model)
    head_of(model).xhead_patch = None
    expected = model(**tokens()).loss
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for key, value in model.named_parameters():
        torch.testing.assert_close(actual[key], value.grad)
    assert next(value for key, value in actual.items() if key.endswith(".up")).any()


def test_status_counts():
    model = patched()
    model(**tokens()).loss.backward()
    assert xhead.status(model) == Status(patched=True, loss=None, head="low_rank", cut=1)


def test_real_logits_without_gradients():
    model = patched()
    batch = tokens()
    with torch.no_grad():
        out = model(**batch)
        hidden = model.model(batch["input_ids"]).last_hidden_state
        assert torch.equal(out.logits, head_of(model).logits(hidden))
    assert isinstance(model(**batch).logits, HeadLogits)
    for options in ({}, {"do_sample": True}, {"num_beams": 3}):
        ids = model.generate(batch["input_ids"], max_new_tokens=5, pad_token_id=0, **options)
        assert ids.shape == (2, 17)


def test_lazy_eval():
    model = xhead.patch(tiny("LlamaForCausalLM").eval(), head="low_rank", lazy_eval=True)
    with torch.no_grad():
        out = model(**tokens())
    assert isinstance(out.logits, HeadLogits)
    torch.testing.assert_close(out.loss, model(**tokens()).loss)


def test_what_else_is_asked_builds_the_logits():
    model = patched()
    logits = model(**tokens()).logits
    real = logits.head.logits(logits.hidden)
    with pytest.warns(MaterializedWarning, match="`log_softmax` needs the logits"):
        torch.testing.assert_close(logits.log_softmax(-1), real.log_softmax(-1))
    again = model(**tokens()).logits
    with pytest.warns(MaterializedWarning, match="`add`"):
        torch.testing.assert_close((again + again)[:, :, 3:], (2 * real)[:, :, 3:])
    torch.testing.assert_close((model(**tokens()).logits[..., 4:9] * 2).materialize(), real[..., 4:9] * 2)
    with pytest.raises(RuntimeError, match="those of the head 'low_rank', which has no weight"):
        model(**tokens()).logits.statistics("lse")
    model.requires_grad_(False)
    assert not model(**tokens()).logits.requires_grad


def test_arguments_of_the_models_loss():
    model = patched()
    batch = tokens()
    rows = head_of(model).loss_rows(
        model.model(batch["input_ids"]).last_hidden_state[:, 2:-1].flatten(0, 1), batch["labels"][:, 3:].flatten()
    )
    torch.testing.assert_close(model(**batch, num_items_in_batch=7).loss, rows.sum() / 7)
    torch.testing.assert_close(model(**batch).loss, rows.mean())
    logits = model(batch["input_ids"]).logits[:, 2:-1].float()
    found = F.cross_entropy(logits.reshape(-1, 96), batch["labels"][:, 3:].flatten(), reduction="none")
    torch.testing.assert_close(found, rows)
    assert xhead.status(model).materialized == 0
    ignored = {**batch, "labels": torch.full_like(batch["labels"], -100), "num_items_in_batch": 1}
    loss = model(**ignored).loss
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_options_of_cross_entropy_that_the_head_does_not_take():
    model = patched()
    logits = model(**tokens()).logits.reshape(-1, 96)
    labels = tokens()["labels"].flatten()
    with pytest.raises(ValueError, match="called with label_smoothing, which the head 'low_rank' does not take"):
        F.cross_entropy(logits, labels, label_smoothing=0.1)
    with pytest.raises(ValueError, match="called with class_weight"):
        F.cross_entropy(logits, labels, weight=torch.ones(96))


def test_changes_of_the_logits_are_refused():
    model = patched("Gemma2ForCausalLM", final_logit_softcapping=30.0)
    with pytest.raises(ValueError, match=r"before the loss \(div 30.0, tanh, mul 30.0\).*'low_rank'.*softcapping=None"):
        model(**tokens())
    patched("Gemma2ForCausalLM", final_logit_softcapping=None)(**tokens()).loss.backward()
    with pytest.raises(ValueError, match=r"columns \(0, 90\)"):
        F.cross_entropy(patched()(**tokens()).logits[0, :, :90], tokens()["labels"][0] % 90)
    patched("CohereForCausalLM", logit_scale=1.0)(**tokens()).loss.backward()
    with pytest.raises(ValueError, match="mul 0.5"):
        patched("CohereForCausalLM", logit_scale=0.5)(**tokens())
    model = patched("BartForConditionalGeneration")
    model.final_logits_bias += 1
    with pytest.raises(ValueError, match=r"add a tensor \(96,\)"):
        model(**tokens())


@pytest.mark.parametrize("name", CLASSES)
def test_unpatch_puts_the_projection_back(name):
    plain = tiny(name).eval()
    model = copy.deepcopy(plain)
    projection, parameters = head_of(model), dict(model.named_parameters(remove_duplicate=False))
    ties = dict(model.all_tied_weights_keys), dict(model._tied_weights_keys)
    xhead.patch(model, head="low_rank")
    assert model.all_tied_weights_keys != ties[0] or not ties[0]
    model.tie_weights()
    model(**tokens()).loss.backward()
    xhead.unpatch(model)
    model.zero_grad()
    assert head_of(model) is projection
    after = dict(model.named_parameters(remove_duplicate=False))
    assert parameters.keys() == after.keys()
    assert all(parameters[key] is after[key] for key in parameters)
    assert (model.all_tied_weights_keys, model._tied_weights_keys) == ties
    assert model.config.to_dict() == plain.config.to_dict()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert torch.equal(model(**tokens()).loss, plain(**tokens()).loss)
    assert not xhead.status(model).patched
    with pytest.raises(ValueError, match="is not patched"):
        xhead.unpatch(model)


def test_unpatch_follows_the_model():
    model = xhead.unpatch(patched(tie_word_embeddings=False).double())
    assert model.lm_head.weight.dtype == torch.float64
    model(**tokens()).loss.backward()


@pytest.mark.parametrize("name", CLASSES + OTHERS)
@pytest.mark.parametrize("tied", [True, False])
def test_saved_and_loaded(name, tied, tmp_path):
    model = patched(name, tie_word_embeddings=tied)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**tokens()).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["xhead_head"] == {"name": "low_rank", "rank": 8}
    assert saved["architectures"] == [name]
    again = xhead.load(tmp_path).eval()
    assert type(again) is type(model)
    assert {key: value.shape for key, value in again.state_dict().items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())
    with torch.no_grad():
        assert torch.equal(again(**tokens()).logits, model(**tokens()).logits)
        assert torch.equal(again(**tokens()).loss, model(**tokens()).loss)
    assert torch.equal(again(**tokens()).loss, model(**tokens()).loss)
    assert xhead.status(again).head == "low_rank"
    with pytest.raises(ValueError, match="loaded with the head 'low_rank', so there is no projection to put back"):
        xhead.unpatch(again)
    again.save_pretrained(tmp_path / "again")
    twice = xhead.load(tmp_path / "again").eval()
    assert torch.equal(twice(**tokens()).loss, model(**tokens()).loss)


def test_load_by_class_and_dtype(tmp_path):
    patched().save_pretrained(tmp_path)
    model = xhead.load(tmp_path, transformers.LlamaForCausalLM, dtype=torch.float64, lazy_eval=True)
    assert head_of(model).up.dtype == torch.float64
    assert head_of(model).calls.dtype == torch.int64
    assert xhead.status(model).lazy_eval


def test_load_what_has_no_head(tmp_path):
    tiny("LlamaForCausalLM").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has xhead_head=None; known heads are"):
        xhead.load(tmp_path)


def test_state_of_a_patched_model_loads_into_another():
    model, other = patched(), patched()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(**tokens()).loss, model(**tokens()).loss)


def test_copies():
    model = patched()
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(each(**tokens()).loss, model(**tokens()).loss)
        assert xhead.unpatch(each).lm_head.weight is not xhead_weight(model)
    assert xhead.status(model).patched


def xhead_weight(model):
    return model.xhead_replaced.projection.weight


def test_patching_again():
    model = patched()
    head = head_of(model)
    assert xhead.patch(model, head="low_rank") is model
    assert head_of(model) is head
    with pytest.raises(ValueError, match=r"already patched, with head='low_rank', rank=8.*got head='low_rank', rank=4"):
        xhead.patch(model, head="low_rank", rank=4)
    with pytest.raises(ValueError, match="already patched, with head='low_rank'.*got loss='cce'"):
        xhead.patch(model)
    with pytest.raises(ValueError, match="already patched, with loss='cce'.*got head='low_rank'"):
        xhead.patch(xhead.patch(tiny("LlamaForCausalLM")), head="low_rank")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "low"}, "unknown head 'low'; known are .*linear, low_rank"),
        ({"head": "low_rank", "ranks": 3}, "unknown option ranks for head 'low_rank'; known are rank, factor"),
        ({"head": "low_rank", "rank": 0}, "rank must be at least 1, got 0"),
        ({"head": "low_rank", "loss": "focal"}, "has a loss of its own, so loss='focal' cannot go with it"),
    ],
)
def test_wrong_arguments(options, message):
    model = tiny("LlamaForCausalLM")
    with pytest.raises(ValueError, match=message):
        xhead.patch(model, **options)
    assert type(model.lm_head) is nn.Linear
    assert not model._forward_pre_hooks
    assert not hasattr(model.config, "xhead_head")


def test_start_options():
    ranks = [patched(), xhead.patch(tiny("LlamaForCausalLM").eval(), head="low_rank", factor=2.0)]
    torch.testing.assert_close(2 * head_of(ranks[0]).up, head_of(ranks[1]).up)
    full = patched(rank=32)
    with torch.no_grad():
        torch.testing.assert_close(full(**tokens()).logits, tiny("LlamaForCausalLM").eval()(**tokens()).logits)


def test_a_name_is_registered_once():
    for name in ("low_rank", "linear"):
        with pytest.raises(ValueError, match=f"a head named '{name}' is registered already"):
            heads.register_head(name, LowRankConfig)(LowRankHead)


def test_a_lost_head_is_noticed():
    model = patched(tie_word_embeddings=False)
    with pytest.raises(AttributeError, match="the head 'low_rank' has no weight of one row a class.*unpatch"):
        model.resize_token_embeddings(104)
    model = patched(tie_word_embeddings=False)
    model.set_output_embeddings(nn.Linear(32, 96))
    with pytest.raises(RuntimeError, match="is lost.*it is a Linear now, where the head 'low_rank' was"):
        model(**tokens())
    xhead.unpatch(model)(**tokens()).loss.backward()
    model = patched()
    model.forward = lambda self=model, **batch: None
    with pytest.raises(RuntimeError, match="has been replaced"):
        model.model(tokens()["input_ids"])


def test_accelerate_and_autocast():
    model = patched()
    expected = model(**tokens()).loss
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(**tokens()).loss, expected, rtol=2**-7, atol=0)
    prepared = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
    torch.testing.assert_close(prepared(**tokens()).loss, expected, rtol=2**-7, atol=0)
    assert xhead.status(model).materialized == 0


def test_compiled():
    model = patched()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**tokens()).loss, model(**tokens()).loss)
