"""The Trainer and PEFT on models whose projection another head has replaced."""

import pytest
import torch
from torch import nn
from transformers import Trainer

import xhead
from tests.test_heads import _low_rank, head_of, patched  # noqa: F401  a fixture
from tests.test_trainer import STEPS, Rows, arguments, pytestmark, train  # noqa: F401  the warnings to ignore
from tests.tiny import tiny, tokens


def test_trainer_saves_and_resumes(tmp_path):
    model = patched(tie_word_embeddings=True)
    before = head_of(model).up.detach().clone()
    trainer, curve = train(model, tmp_path, save_strategy="steps", save_steps=2, seed=3)
    assert len(curve) == STEPS
    assert not torch.equal(head_of(model).up, before)
    assert xhead.status(model).materialized == 0
    assert trainer.evaluate()["eval_loss"] > 0
    again = patched(tie_word_embeddings=True)
    trainer = Trainer(model=again, args=arguments(tmp_path, seed=3), train_dataset=Rows())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(head_of(again).up, head_of(model).up)
    loaded = xhead.load(tmp_path / "checkpoint-4").eval()
    with torch.no_grad():
        assert torch.equal(loaded(**tokens()).logits, model.eval()(**tokens()).logits)


def test_gradient_accumulation_is_one_batch(tmp_path):
    curves = [
        train(patched(), tmp_path, per_device_train_batch_size=8 // steps, gradient_accumulation_steps=steps)[1]
        for steps in (1, 4)
    ]
    torch.testing.assert_close(*curves, rtol=1e-4, atol=1e-5)


def test_label_smoothing_of_the_trainer_builds_the_logits(tmp_path):
    model = patched()
    with pytest.warns(xhead.MaterializedWarning, match="`log_softmax` needs the logits"):
        train(model, tmp_path, label_smoothing_factor=0.1)
    assert xhead.status(model).operations == {"log_softmax": STEPS}


def adapted(model, **options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(2)
    config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"], **options)
    return peft.get_peft_model(model, config).eval()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_train_a_copy_of_the_head(tmp_path):
    peft = pytest.importorskip("peft")
    base = patched(tie_word_embeddings=False)
    base.save_pretrained(tmp_path / "base")
    model = adapted(base, modules_to_save=["lm_head"])
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(**tokens()).loss.backward()
        optimizer.step()
    wrapper = model.get_base_model().lm_head
    assert not torch.equal(wrapper.original_module.up, wrapper.modules_to_save["default"].up)
    assert wrapper.original_module.up.grad is None
    assert xhead.status(model).cut == 2
    with pytest.raises(ValueError, match="wraps the head: unload the adapter"):
        xhead.unpatch(model)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    again = peft.PeftModel.from_pretrained(xhead.load(tmp_path / "base"), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(again(**tokens()).logits, model(**tokens()).logits)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**tokens()).loss, again(**tokens()).loss)
    assert type(xhead.unpatch(merged).lm_head) is nn.Linear


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_come_after_the_head():
    model = adapted(patched())
    model(**tokens()).loss.backward()
    assert xhead.status(model).materialized == 0
    for options in ({"modules_to_save": ["lm_head"]},):
        wrapped = adapted(tiny("LlamaForCausalLM", tie_word_embeddings=False), **options)
        with pytest.raises(ValueError, match="an adapter wraps the output projection.*replace the head first"):
            xhead.patch(wrapped, head="low_rank")
