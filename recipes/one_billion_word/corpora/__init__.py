"""Where sentences come from: `load_corpus` opens what the user gave, `Corpus` is what the rest of the recipe sees."""

from recipes.one_billion_word.corpora.corpus import Corpus
from recipes.one_billion_word.corpora.load import load_corpus

__all__ = ["Corpus", "load_corpus"]
