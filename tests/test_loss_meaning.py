"""Which loss is computed: inside a loss of one's own, and where the logits are built after all."""

import warnings

import pytest
import torch
import torch.nn.functional as F

import xhead
from tests.tiny import tiny, tokens
from xhead.losses import get_loss
from xhead.losses.alignment import token_entropy, token_logprobs
from xhead.losses.distillation import forward_kl

CROSS_ENTROPIES = {
    "cross_entropy": lambda logits, labels: F.cross_entropy(logits, labels, reduction="none"),
    "module": torch.nn.CrossEntropyLoss(reduction="none"),
    "nll_loss": lambda logits, labels: F.nll_loss(logits.log_softmax(-1), labels, reduction="none"),
    "gather": lambda logits, labels: -logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1),
}


def _gradients(model, loss):
    loss.backward()
    return {name: each.grad for name, each in model.named_parameters()}


@pytest.mark.parametrize("name", CROSS_ENTROPIES)
def test_cross_entropy_inside_a_loss_is_cross_entropy(name):
    def weighted(logits, labels):
        return CROSS_ENTROPIES[name](logits, labels) * (1 + labels % 3)

    model = xhead.patch(tiny("LlamaForCausalLM"), loss=weighted)
    batch = tokens()
    batch["labels"][:, ::3] = -100
    found = model(**batch).loss
    plain = tiny("LlamaForCausalLM")
    logits, labels = plain(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    kept = labels != -100
    rows = F.cross_entropy(logits[kept], labels[kept], reduction="none")
    expected = (rows * (1 + labels[kept] % 3)).mean()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    for (key, actual), wanted in zip(
        _gradients(model, found).items(), _gradients(plain, expected).values(), strict=True
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-7, msg=lambda text, k=key: f"{k} {text}")
    assert xhead.status(model).materialized == 0


@pytest.mark.filterwarnings("ignore::xhead.MaterializedWarning")
def test_a_model_whose_loss_cannot_be_the_patched_one():
    """A step that lazy logits do not know: cross-entropy is still right, any other loss would be cross-entropy."""
    for loss in ("cce", "gce", lambda logits, labels: logits.statistics("lse").lse):
        model = xhead.patch(tiny("LlamaForCausalLM"), loss=loss)
        model.lm_head.register_forward_hook(lambda module, arguments, output: output.abs())
        if loss == "cce":
            model(**tokens()).loss.backward()
            continue
        with pytest.raises(RuntimeError, match="computed its loss of logits that were built, so it is not .*: abs"):
            model(**tokens())
        model(input_ids=tokens()["input_ids"])
        with torch.no_grad():
            model(**tokens())


def _logits(loss, **options):
    batch = tokens()
    return xhead.patch(tiny("LlamaForCausalLM"), loss=loss, **options)(input_ids=batch["input_ids"]).logits, batch


def test_built_logits_say_which_loss_they_are_not():
    for options, text in (({}, "not wrong"), ({"label_smoothing": 0.1}, "a loss computed of them is not 'cce'")):
        logits, batch = _logits("cce", **options)
        with pytest.warns(xhead.MaterializedWarning, match=text):
            F.cross_entropy(logits.transpose(1, 2), batch["labels"])
    logits, batch = _logits("gce")
    with pytest.warns(xhead.MaterializedWarning, match="is not 'gce', which answers F.cross_entropy"):
        F.cross_entropy(logits.transpose(1, 2), batch["labels"])


def test_log_probabilities_are_not_the_patched_loss():
    """As the Trainer's label smoothing asks for them."""
    logits, batch = _logits("focal")
    with pytest.warns(UserWarning, match="patched with the loss 'focal': what is made of them is cross-entropy"):
        F.log_softmax(logits, -1).gather(-1, batch["input_ids"][..., None])
    for loss in ("cce", "focal"):
        logits, batch = _logits(loss)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            F.nll_loss(F.log_softmax(logits.flatten(0, 1), -1), batch["labels"].flatten())
            if loss == "cce":
                F.log_softmax(logits, -1).gather(-1, batch["input_ids"][..., None])


def test_logits_that_are_tensors():
    logits, labels = torch.randn(3, 7), torch.tensor([1, 2, 3])
    lazy = xhead.LazyLogits(torch.randn(3, 4), torch.randn(7, 4))
    calls = (
        lambda: get_loss("focal")(logits, labels),
        lambda: token_logprobs(logits, labels),
        lambda: token_entropy(logits),
        lambda: forward_kl(lazy, logits),
        lambda: forward_kl(logits, lazy),
    )
    for call in calls:
        with pytest.raises(TypeError, match=r"logits must be lazy, .* got a tensor \(3, 7\).* lazy_eval=True"):
            call()


HIDDEN, WEIGHT, TARGET = torch.randn(3, 4), torch.randn(7, 4), torch.tensor([1, 2, -100])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: xhead.linear_cross_entropy(HIDDEN, WEIGHT, TARGET, scale=torch.ones((), requires_grad=True)),
            TypeError,
            "scale must be a number, got Tensor; a learned one is multiplied",
        ),
        (
            lambda: xhead.linear_cross_entropy(HIDDEN, WEIGHT, TARGET, softcap=torch.ones(())),
            TypeError,
            "softcap must be a number or None, got Tensor",
        ),
        (lambda: xhead.LazyLogits(HIDDEN, WEIGHT, softcap=torch.ones(())), TypeError, "softcap must be a number"),
        (
            lambda: xhead.LazyLogits(HIDDEN, WEIGHT).statistics("expectation", values=torch.zeros(7, device="meta")),
            RuntimeError,
            "values must be on the device of the hidden states, cpu, got meta",
        ),
        (
            lambda: get_loss("focal")(xhead.LazyLogits(HIDDEN, WEIGHT), TARGET),
            IndexError,
            r"target -100 is out of bounds: classes are 0 to 6; leave the rows out, logits\[labels != -100\]",
        ),
        (lambda: xhead.patch(tiny("LlamaForCausalLM"), engine="trition"), ValueError, "unknown engine 'trition'"),
        (
            lambda: xhead.patch(tiny("LlamaForCausalLM"), lse_penalty=-1),
            ValueError,
            "lse_penalty must be a finite number of at least 0, got -1",
        ),
        (
            lambda: xhead.linear_cross_entropy(HIDDEN, WEIGHT, TARGET, lse_penalty="a"),
            ValueError,
            "lse_penalty must be a finite number of at least 0, got 'a'",
        ),
    ],
)
def test_what_cannot_be_meant(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_ignore_index_as_torch_leaves_it_out():
    found, expected = (xhead.linear_cross_entropy(HIDDEN, WEIGHT, TARGET, ignore_index=each) for each in (None, -100))
    assert torch.equal(found, expected)
