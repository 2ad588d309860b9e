"""The command `python -m recipes.arithmetic`."""

from recipes.arithmetic.compare import main
from recipes.common.processes import leave_processes

if __name__ == "__main__":
    main()
    leave_processes()
