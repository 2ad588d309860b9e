"""TRL's trainers compute the loss in an output head of their own."""

import copy

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import xhead
import xhead.trainer
from tests.processes import in_processes
from tests.tiny import tiny

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:trl"),
]


@pytest.fixture
def tokenizer():
    return make_tokenizer()


def make_tokenizer():
    words = {word: index for index, word in enumerate(["<pad>", "</s>", *(f"w{i}" for i in range(90))])}
    model = tokenizers.models.WordLevel(words, unk_token="<pad>")
    fast = tokenizers.Tokenizer(model)
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", eos_token="</s>", unk_token="<pad>")


def make(trainer_class, model, tokenizer, folder, arguments=None, **options):
    text = [" ".join(f"w{(7 * row + 3 * i * i) % 90}" for i in range(4 + row)) for row in range(8)]
    defaults = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "shuffle_dataset": False,
    }
    args = trl.SFTConfig(**{**defaults, **(arguments or {})})
    return trainer_class(
        model=model,
        args=args,
        train_dataset=datasets.Dataset.from_dict({"text": text}),
        processing_class=tokenizer,
        **options,
    )


def curve(trainer):
    trainer.train()
    return torch.tensor([[e["loss"], e["grad_norm"]] for e in trainer.state.log_history if "grad_norm" in e])


def test_sft_trainer_raises_with_the_fix(tokenizer, tmp_path):
    trainer = make(trl.SFTTrainer, xhead.patch(tiny("LlamaForCausalLM").eval()), tokenizer, tmp_path)
    with pytest.raises(
        RuntimeError, match=r"TRL has given LlamaForCausalLM .*own_loss\(SFTTrainer\).*from xhead\.trainer import"
    ):
        trainer.train()


@pytest.mark.parametrize("adapter", [False, True])
def test_sft_trainer_with_the_fix(adapter, tokenizer, tmp_path):
    options = {}
    if adapter:
        peft = pytest.importorskip("peft")
        options["peft_config"] = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    base = tiny("LlamaForCausalLM").eval()
    torch.manual_seed(1)
    expected = curve(make(trl.SFTTrainer, copy.deepcopy(base), tokenizer, tmp_path, **options))
    torch.manual_seed(1)
    model = xhead.patch(base)
    actual = curve(make(xhead.trainer.own_loss(trl.SFTTrainer), model, tokenizer, tmp_path, **options))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert (xhead.status(model).cut, xhead.status(model).materialized) == (2, 0)


def _data_parallel(rank, folder):
    """Label smoothing takes the loss of the logits outside of the model, in a DDP that looks for parameters."""
    arguments = {"per_device_train_batch_size": 2, "label_smoothing_factor": 0.1}
    curves = []
    for patch in (lambda model: model, xhead.patch):
        model = patch(tiny("LlamaForCausalLM").eval())
        torch.manual_seed(1)
        trainer = make(xhead.trainer.own_loss(trl.SFTTrainer), model, make_tokenizer(), folder, arguments)
        curves.append(curve(trainer))
        assert trainer.model_wrapped.find_unused_parameters
    torch.testing.assert_close(*curves, rtol=1e-4, atol=1e-5)
    assert (xhead.status(model).cut, xhead.status(model).materialized) == (4, 0)


@pytest.mark.filterwarnings("ignore")
def test_sft_trainer_in_two_processes(tmp_path):
    in_processes(_data_parallel, 2, tmp_path, str(tmp_path))


def test_adapters_do_not_hide_the_fused_head(tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"])
    trainer = make(trl.SFTTrainer, xhead.patch(tiny("LlamaForCausalLM")), tokenizer, tmp_path, peft_config=config)
    with pytest.raises(RuntimeError, match="own_loss"):
        trainer.train()


def test_own_loss_of_something_else():
    with pytest.raises(TypeError, match=r"trainer_class must be a subclass of transformers\.Trainer, got 'SFTTrainer'"):
        xhead.trainer.own_loss("SFTTrainer")  # type: ignore[arg-type]
