"""Patched models in torch.compile."""

import copy

import pytest
import torch

import xhead
from tests.tiny import assert_same_gradients, tokens, twins

# The compiler's own: it imports a deprecated module, and asks tensors that are no leaves for their gradient.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


def compiled_step(name, **options):
    plain, model = twins(name)
    xhead.patch(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", **options)
    for seed in (1, 2):
        batch = tokens(seed=seed)
        for each in (plain, model):
            each.zero_grad(set_to_none=True)
        actual, expected = compiled(**batch).loss, plain(**batch).loss
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
        actual.backward()
        expected.backward()
        assert_same_gradients(model, plain)
    return xhead.status(model)


@pytest.mark.parametrize(
    "name",
    [
        "LlamaForCausalLM",
        "Gemma2ForCausalLM",
        "CohereForCausalLM",
        "GraniteForCausalLM",
        "Qwen3ForCausalLM",
    ],
)
def test_one_graph(name):
    status = compiled_step(name, fullgraph=True)
    assert status.compiled
    assert (status.cut, status.materialized) == (0, 0)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "T5ForConditionalGeneration"])
def test_with_graph_breaks(name):
    status = compiled_step(name)
    assert status.materialized == 0
    assert status.compiled or status.cut == 2


def test_the_graph_holds_the_statistics_and_no_logits():
    model = xhead.patch(twins("LlamaForCausalLM")[1])
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    torch.compile(model, backend=backend, fullgraph=True)(**tokens())
    assert len(graphs) == 1
    assert any("row_statistics" in str(node.target) for node in graphs[0].graph.nodes)
    values = [node.meta.get("example_value") for node in graphs[0].graph.nodes]
    shapes = [tuple(value.shape) for value in values if isinstance(value, torch.Tensor)]
    rows = tokens()["input_ids"].numel()
    assert all(torch.Size(shape).numel() < rows * 96 or shape == (96, 32) for shape in shapes)


def test_compiled_evaluation_is_stock():
    plain, model = twins("LlamaForCausalLM")
    xhead.patch(model)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(**tokens())
        expected = torch.compile(copy.deepcopy(plain), backend="aot_eager", fullgraph=True)(**tokens())
    assert torch.equal(compiled.logits, expected.logits)


def test_logits_of_a_compiled_model():
    plain, model = twins("LlamaForCausalLM")
    xhead.patch(model)
    torch._dynamo.reset()
    out = torch.compile(model, backend="aot_eager", fullgraph=True)(**tokens())
    assert isinstance(out.logits, xhead.LazyLogits)
    with pytest.warns(xhead.standin.MaterializedWarning):
        torch.testing.assert_close(out.logits.softmax(-1), plain(**tokens()).logits.softmax(-1))


def test_materialized_in_a_graph():
    plain, model = twins("LlamaForCausalLM")
    xhead.patch(model)
    torch._dynamo.reset()
    step = torch.compile(lambda model: model(**tokens()).logits.softmax(-1), backend="eager")
    torch.testing.assert_close(step(model), plain(**tokens()).logits.softmax(-1))
    assert xhead.status(model).operations == {"softmax": 1}


def test_inductor():
    plain, model = twins("LlamaForCausalLM")
    xhead.patch(model)
    torch._dynamo.reset()
    actual, expected = torch.compile(model, fullgraph=True)(**tokens()).loss, plain(**tokens()).loss
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    actual.backward()
    expected.backward()
    assert_same_gradients(model, plain)


def test_head_replaced_before_compilation():
    plain, model = twins("LlamaForCausalLM", tie_word_embeddings=False)
    xhead.patch(model)
    model.lm_head = copy.deepcopy(plain.lm_head)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="output projection that xhead patched has been replaced"):
        torch.compile(model, backend="eager", fullgraph=True)(**tokens())
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager")(**tokens()).loss, plain(**tokens()).loss)
    assert type(model.lm_head) is not torch.nn.Linear
    torch.testing.assert_close(torch.compile(model, backend="eager")(**tokens()).loss, plain(**tokens()).loss)
    status = xhead.status(model)
    assert status.cut + status.compiled > 0
    assert status.materialized == 0
