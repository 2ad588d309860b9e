"""The stock Trainer on patched models: the loss curves are those of the stock models."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import Trainer, TrainingArguments

import xhead
from tests.tiny import tiny, twins

# The Trainer's own: it asks a model for an attribute that transformers has renamed, and pins memory without a GPU.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]
STEPS = 4


class Rows(torch.utils.data.Dataset):
    """Rows of which different numbers of tokens count, so that the mean of means is not the mean."""

    def __len__(self):
        return 32

    def __getitem__(self, index):
        ids = torch.randint(4, 60, (12,), generator=torch.Generator().manual_seed(index))
        labels = ids.clone()
        labels[: index % 10] = -100
        return {"input_ids": ids, "labels": labels}


def arguments(folder, **changes):
    defaults = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(output_dir=str(folder), **{**defaults, **changes})


def train(model, folder, trainer_options=None, **changes):
    """The trainer after training, and the losses and gradient norms it logged."""
    trainer = Trainer(
        model=model,
        args=arguments(folder, **changes),
        train_dataset=Rows(),
        eval_dataset=Rows(),
        **(trainer_options or {}),
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return trainer, torch.tensor([[entry["loss"], entry["grad_norm"]] for entry in logged])


def assert_same_curves(name, folder, tolerance=1e-6, passes=None, model_options=None, trainer_options=None, **changes):
    plain, model = twins(name, **(model_options or {}))
    xhead.patch(model)
    _, expected = train(plain, folder, trainer_options, **changes)
    trainer, actual = train(model, folder, trainer_options, **changes)
    assert len(actual) == STEPS
    torch.testing.assert_close(actual[:, 0], expected[:, 0], rtol=tolerance, atol=0)
    # Gradient norms are sums over all parameters, each with rounding of its own, after the steps before.
    torch.testing.assert_close(actual[:, 1], expected[:, 1], rtol=10 * tolerance, atol=0)
    status = xhead.status(model)
    steps = STEPS * changes.get("gradient_accumulation_steps", 1)
    assert (status.cut, status.materialized) == (passes or steps, 0)
    return trainer, plain


@pytest.mark.parametrize(
    "name", ["LlamaForCausalLM", "Gemma2ForCausalLM", "BertForMaskedLM", "T5ForConditionalGeneration"]
)
def test_plain(name, tmp_path):
    assert_same_curves(name, tmp_path)


def test_tied(tmp_path):
    assert_same_curves("LlamaForCausalLM", tmp_path, model_options={"tie_word_embeddings": True})


def test_gradient_accumulation(tmp_path):
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    assert_same_curves("LlamaForCausalLM", tmp_path, **options)


def test_accumulated_gradient_is_that_of_the_batch(tmp_path):
    models = [xhead.patch(tiny("LlamaForCausalLM").eval()) for _ in range(2)]
    curves = [
        train(model, tmp_path, per_device_train_batch_size=8 // steps, gradient_accumulation_steps=steps)[1]
        for model, steps in zip(models, (1, 4), strict=True)
    ]
    torch.testing.assert_close(*curves, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "T5ForConditionalGeneration"])
@pytest.mark.parametrize("switch", [True, False])
def test_accumulation_of_classes_that_ignore_the_number_of_items(name, switch, tmp_path):
    """Their forward takes `num_items_in_batch` and ignores it: `accepts_loss_kwargs = False` tells the Trainer."""

    class Even(Rows):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            return {**item, "labels": item["input_ids"]}

    losses = []
    for patched in (False, True):
        for steps in (1, 4):
            model = tiny(name).eval()
            if patched:
                xhead.patch(model)
            if switch:
                model.accepts_loss_kwargs = False
            trainer = Trainer(
                model=model,
                args=arguments(
                    tmp_path, per_device_train_batch_size=8 // steps, gradient_accumulation_steps=steps, max_steps=1
                ),
                train_dataset=Even(),
            )
            trainer.train()
            losses.append([trainer.state.log_history[0][key] for key in ("loss", "grad_norm")])
    (stock, stock_accumulated, cut, cut_accumulated) = torch.tensor(losses)
    torch.testing.assert_close(cut, stock, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cut_accumulated, stock_accumulated, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cut_accumulated, cut * (1 if switch else 4), rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing(tmp_path):
    assert_same_curves("LlamaForCausalLM", tmp_path, gradient_checkpointing=True)


def test_bf16_autocast(tmp_path):
    # Stock rounds each logit to bfloat16 (relative 2^-9); the cut loss keeps them in float32.
    assert_same_curves("LlamaForCausalLM", tmp_path, tolerance=2**-9, bf16=True, learning_rate=1e-3)


def test_label_smoothing(tmp_path):
    # Two passes a step: the picked log-probability, and the mean over all classes.
    assert_same_curves("LlamaForCausalLM", tmp_path, passes=2 * STEPS, label_smoothing_factor=0.1)


def test_label_smoothing_of_masked_models(tmp_path):
    assert_same_curves("BertForMaskedLM", tmp_path, passes=2 * STEPS, label_smoothing_factor=0.1)


def test_compute_loss_func(tmp_path):
    def compute_loss(outputs, labels, num_items_in_batch=None):
        logits = outputs["logits"].float()[:, :-1]
        flat = logits.reshape(-1, logits.shape[-1])
        return F.cross_entropy(flat, labels[:, 1:].reshape(-1), reduction="sum") / num_items_in_batch

    assert_same_curves("LlamaForCausalLM", tmp_path, trainer_options={"compute_loss_func": compute_loss})


def test_evaluation_of_the_loss(tmp_path):
    trainer, plain = assert_same_curves(
        "LlamaForCausalLM", tmp_path, eval_strategy="steps", eval_steps=2, prediction_loss_only=True
    )
    expected = Trainer(model=plain, args=arguments(tmp_path), eval_dataset=Rows()).evaluate()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)


def test_lazy_evaluation_of_the_loss(tmp_path):
    plain, model = twins("LlamaForCausalLM")
    xhead.patch(model, lazy_eval=True)
    losses = [
        Trainer(model=each, args=arguments(tmp_path, prediction_loss_only=True), eval_dataset=Rows()).evaluate()[
            "eval_loss"
        ]
        for each in (plain, model)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert (xhead.status(model).cut, xhead.status(model).materialized) == (8, 0)


@pytest.mark.parametrize("preprocess", [False, True])
def test_evaluation_with_metrics(preprocess, tmp_path):
    def metrics(prediction):
        classes = prediction.predictions if preprocess else prediction.predictions.argmax(-1)
        counted = prediction.label_ids != -100
        return {"accuracy": float((classes == prediction.label_ids)[counted].mean())}

    options = {"compute_metrics": metrics}
    if preprocess:
        options["preprocess_logits_for_metrics"] = lambda logits, labels: logits.argmax(-1)
    plain, model = twins("LlamaForCausalLM")
    xhead.patch(model)
    found = [
        Trainer(model=each, args=arguments(tmp_path), eval_dataset=Rows(), **options).evaluate()
        for each in (plain, model)
    ]
    assert found[0]["eval_accuracy"] == found[1]["eval_accuracy"]
    assert found[0]["eval_loss"] == found[1]["eval_loss"]


def test_save_resume_and_generate(tmp_path):
    def fresh():
        return tiny("LlamaForCausalLM").eval()

    options = {"save_strategy": "steps", "save_steps": 2}
    _, expected = train(fresh(), tmp_path / "plain", **options)
    patched = xhead.patch(fresh())
    train(patched, tmp_path / "patched", **options)
    resumed = xhead.patch(fresh())
    trainer = Trainer(model=resumed, args=arguments(tmp_path / "patched", **options), train_dataset=Rows())
    trainer.train(resume_from_checkpoint=str(tmp_path / "patched" / "checkpoint-2"))
    assert trainer.state.log_history[3]["loss"] == pytest.approx(float(expected[3, 0]), rel=1e-5)
    trainer.save_model(str(tmp_path / "saved"))
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert type(reloaded.lm_head) is torch.nn.Linear
    ids = Rows()[0]["input_ids"][None]
    tokens = [each.eval().generate(ids, max_new_tokens=4, pad_token_id=0) for each in (reloaded, resumed)]
    assert torch.equal(*tokens)


def test_torch_compile(tmp_path):
    torch._dynamo.reset()
    plain, model = twins("LlamaForCausalLM")
    xhead.patch(model)
    _, expected = train(plain, tmp_path)
    _, actual = train(model, tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)
    status = xhead.status(model)
    assert status.compiled
    assert status.materialized == 0


def test_a_loss_of_ones_own_is_counted_the_stock_way(tmp_path):
    """`num_items_in_batch` and the ignored rows stay with the model, whatever the loss of a row."""

    def rows(logits, labels):
        found = logits.statistics("lse", "target", target=labels)
        return 2 * (found.lse - found.target)

    plain, model = twins("LlamaForCausalLM")
    xhead.patch(model, loss=rows)
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 1}
    _, expected = train(plain, tmp_path, **options)
    _, actual = train(model, tmp_path, **options)
    torch.testing.assert_close(actual, 2 * expected, rtol=1e-5, atol=1e-5)


def test_liger_forward_raises(tmp_path):
    """What `use_liger_kernel=True` does: another forward on the instance, which reads the head's weight by itself."""
    import types

    model = xhead.patch(tiny("LlamaForCausalLM"))
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=Rows())

    def lce_forward(self, input_ids=None, labels=None, **kwargs):
        hidden = self.model(input_ids).last_hidden_state
        return {"loss": F.cross_entropy((hidden @ self.lm_head.weight.T).flatten(0, 1), labels.flatten())}

    model.forward = types.MethodType(lce_forward, model)
    with pytest.raises(RuntimeError, match=r"lce_forward.*use_liger_kernel=False"):
        trainer.train()


def test_nothing_is_warned_about(tmp_path):
    model = xhead.patch(copy.deepcopy(tiny("LlamaForCausalLM")))
    with warnings.catch_warnings():
        warnings.simplefilter("error", xhead.standin.MaterializedWarning)
        train(model, tmp_path, eval_strategy="steps", eval_steps=2)
