"""Probabilistic forecasts by a language model over value tokens: the Fourier head against the dense one."""
