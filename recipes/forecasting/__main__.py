"""The command `python -m recipes.forecasting`."""

from recipes.forecasting.compare import main

if __name__ == "__main__":
    main()
