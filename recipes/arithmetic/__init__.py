"""Answers that are numbers: cross-entropy against cross-entropy with a number token loss, over several seeds."""
