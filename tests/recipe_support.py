"""Made-up text and a tiny model for the tests of the One Billion Word recipe; what accelerate's launcher reads."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from transformers import LlamaConfig, LlamaForCausalLM, set_seed


def sentences(number: int, seed: int = 0) -> list[str]:
    """Sentences of a small made-up language whose next word depends on the last: there is something to learn."""
    generator = np.random.default_rng(seed)
    lines = []
    for _ in range(number):
        word, words = int(generator.integers(40)), []
        for _ in range(int(generator.integers(1, 14))):
            words.append(f"w{word}")
            word = (word * 7 + int(generator.integers(3))) % 40
        lines.append(" ".join(words))
    return lines


def write_text(parent: Path) -> Path:
    """A folder with train.txt, valid.txt and test.txt."""
    folder = parent / "text"
    folder.mkdir()
    for split, number in (("train", 300), ("valid", 30), ("test", 40)):
        (folder / f"{split}.txt").write_text("\n".join(sentences(number, seed=number)) + "\n")
    return folder


def tiny_model(vocabulary_size: int, block_length: int = 64) -> LlamaForCausalLM:
    """A model with random weights large enough that its predictions differ."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=block_length,
        initializer_range=0.5,
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval()


def launched_environment(file: Path) -> dict[str, str]:
    """What accelerate's launcher tells the processes that it starts with this configuration file."""
    line = ["--config_file", str(file), "--main_process_port", "0", "script.py"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(line))
    before = dict(os.environ)
    try:
        found = prepare_multi_gpu_env(arguments)
    finally:
        os.environ.clear()
        os.environ.update(before)
    ours = ("ACCELERATE_", "FSDP_", "PARALLELISM_")
    return {key: value for key, value in found.items() if before.get(key) != value and key.startswith(ours)}
