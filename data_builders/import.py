"""The command `coconut data import`: the name of `data_builders.importing` there is a keyword of Python."""

from data_builders.importing import main

if __name__ == "__main__":
    main()
