"""Transformers of Hugging Face with random weights, in folders, with a tokenizer of given texts."""

import copy
import json

from transformers import AutoModel, BertConfig, DistilBertConfig, ModernBertConfig, set_seed

from recipes.extreme_classification.neural.inputs import make_reader
from tests.extreme_words import small_options

_SMALL = {
    "bert": BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16),
    "distilbert": DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=16),
    "modernbert": ModernBertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16),
}
KINDS = tuple(_SMALL)


def write_encoder(kind, folder, texts, dropout=0.0):
    """`folder`, with a model of the kind and its tokenizer."""
    set_seed(0)
    reader = make_reader(small_options(), texts)
    reader.tokenizer.save_pretrained(folder)
    config = copy.deepcopy(_SMALL[kind])
    config.vocab_size, config.pad_token_id = reader.size, reader.tokenizer.pad_token_id
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"):
        if hasattr(config, name):
            setattr(config, name, dropout)
    AutoModel.from_config(config).save_pretrained(folder)
    return folder


def write_sentence_folder(kind, folder, texts, *, pooling="mean", normalise=True, inside="", older=False):
    """A folder of sentence-transformers around such a model. older: as its versions before 5 wrote it"""
    package = "sentence_transformers.models" if older else "sentence_transformers.sentence_transformer.modules.any"
    modules = [("Transformer", inside), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")][: 3 if normalise else 2]
    write_encoder(kind, folder / inside, texts)
    listed = [{"idx": i, "name": str(i), "path": p, "type": f"{package}.{n}"} for i, (n, p) in enumerate(modules)]
    (folder / "modules.json").write_text(json.dumps(listed))
    config = {"embedding_dimension": 16, "pooling_mode": pooling, "include_prompt": True}
    if older:
        names = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens"}
        config = {f"pooling_mode_{name}": pooling == key for key, name in names.items()}
        config["word_embedding_dimension"] = 16
    for name, content in (("1_Pooling", config), ("2_Normalize", {})):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(content))
    (folder / inside / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 12}))
    return folder
