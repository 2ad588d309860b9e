"""The command `python -m recipes.one_billion_word`."""

from recipes.common.processes import leave_processes
from recipes.one_billion_word.train import main

if __name__ == "__main__":
    main()
    leave_processes()
