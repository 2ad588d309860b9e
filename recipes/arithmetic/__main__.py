"""The command `python -m recipes.arithmetic`."""

from recipes.arithmetic.compare import main

if __name__ == "__main__":
    main()
