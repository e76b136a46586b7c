"""python -m coconut.adaptive"""

from coconut.adaptive.command import main

if __name__ == "__main__":
    main()
