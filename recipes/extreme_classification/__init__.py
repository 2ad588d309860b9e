"""Extreme multi-label classification: data sets of the Extreme Classification Repository's forms, models, metrics."""
