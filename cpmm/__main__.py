"""``python -m cpmm``: the command line of the project's own tool."""

from workflows.tool import main

if __name__ == "__main__":
    main()
