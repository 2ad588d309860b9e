"""Word-level language modelling on the One Billion Word benchmark, and on any text of the same form."""
