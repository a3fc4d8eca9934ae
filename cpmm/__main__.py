"""``python -m cpmm``: the command line of the project's own tool."""

from cpmm.cli.main import main

if __name__ == "__main__":
    main()
