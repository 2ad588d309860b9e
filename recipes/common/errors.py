"""The one error that the command shows without a traceback."""


class RecipeError(ValueError):
    """What the user gave cannot be used: the message names it, says what is allowed, and what to do."""
