"""Neural models of extreme classification: an encoder of documents, and label vectors that are encoded or trained."""
