"""Extreme classification: how good a ranking of very many labels is, and exact search for the best ones.

The metrics need scipy, which the extra `retrieval` brings.
"""
