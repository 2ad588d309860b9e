"""Recipes: each folder is a command, `python -m recipes.NAME`, that trains on real data and reports its numbers."""
