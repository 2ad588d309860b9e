"""The command `python -m recipes.forecasting`."""

from recipes.common.processes import leave_processes
from recipes.forecasting.compare import main

if __name__ == "__main__":
    main()
    leave_processes()
