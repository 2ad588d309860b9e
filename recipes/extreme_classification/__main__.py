"""The command `python -m recipes.extreme_classification`."""

from recipes.extreme_classification.command import main

if __name__ == "__main__":
    main()
