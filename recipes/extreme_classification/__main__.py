"""The command `python -m recipes.extreme_classification`."""

from recipes.common.processes import leave_processes
from recipes.extreme_classification.command import main

if __name__ == "__main__":
    main()
    leave_processes()
