"""The codebook and Fourier heads under the Trainer, accelerate and PEFT."""

import accelerate
import pytest
import torch
from transformers import Trainer

import xhead
from tests.test_trainer import STEPS, Rows, arguments, pytestmark, train  # noqa: F401  the warnings to ignore
from tests.tiny import tiny, tokens

HEADS = {
    "one code a token": {"head": "vq", "codebook_size": 12, "start": "random", "token_bias": "learned"},
    "two codes a token": {"head": "vq", "codebook_size": 12, "start": "random", "residual_size": 9},
    "fourier": {"head": "fourier", "num_frequencies": 9},
    "fourier range": {"head": "fourier", "num_frequencies": 9, "token_range": (10, 90), "regularization": 1e-6},
}


def patched(name):
    return xhead.patch(tiny("LlamaForCausalLM", tie_word_embeddings=False), **HEADS[name])


def logits(model):
    with torch.no_grad():
        return model.eval()(**tokens()).logits


@pytest.mark.parametrize("name", HEADS)
def test_trainer_saves_resumes_and_reloads(name, tmp_path):
    model = patched(name)
    before = {key: value.clone() for key, value in model.lm_head.named_parameters()}
    _, curve = train(model, tmp_path, save_strategy="steps", save_steps=2, seed=3)
    assert len(curve) == STEPS and curve.isfinite().all()
    assert xhead.status(model).materialized == 0
    assert all(not torch.equal(value, before[key]) for key, value in model.lm_head.named_parameters())
    again = patched(name)
    trainer = Trainer(model=again, args=arguments(tmp_path, seed=3), train_dataset=Rows())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for mine, other in zip(again.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, other)
    assert torch.equal(logits(xhead.load(tmp_path / "checkpoint-4")), logits(model))


@pytest.mark.parametrize("name", HEADS)
def test_accelerate(name):
    plain = patched(name)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = patched(name)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    alone = torch.optim.SGD(plain.parameters(), lr=0.1)
    for seed in (1, 2):
        with accelerator.accumulate(model):
            accelerator.backward(model(**tokens(seed=seed)).loss)
            optimizer.step()
            optimizer.zero_grad()
        (plain(**tokens(seed=seed)).loss / 2).backward()
    alone.step()
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, other)
    assert xhead.status(accelerator.unwrap_model(model)).materialized == 0


@pytest.mark.parametrize("name", HEADS)
def test_accelerate_in_half_precision(name):
    model = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(patched(name))
    loss = model(**tokens()).loss
    loss.backward()
    torch.testing.assert_close(loss, patched(name)(**tokens()).loss, rtol=2**-6, atol=0)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_adapters(name, saved, tmp_path):
    """LoRA on the attention; with `saved`, a copy of the whole head is trained and saved beside it."""
    peft = pytest.importorskip("peft")
    base = patched(name)
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"], modules_to_save=saved)
    model = peft.get_peft_model(base, config).train()
    trainable = [each for each in model.parameters() if each.requires_grad]
    optimizer, losses = torch.optim.AdamW(trainable, lr=1e-2), []
    for _ in range(6):
        optimizer.zero_grad()
        losses.append(model(**tokens()).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(each.grad is not None for each in trainable)
    assert (xhead.status(model).cut, xhead.status(model).materialized) == (6, 0)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    again = peft.PeftModel.from_pretrained(xhead.load(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    torch.testing.assert_close(logits(model.merge_and_unload()), logits(again))
