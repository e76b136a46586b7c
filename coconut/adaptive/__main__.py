"""python -m coconut.adaptive"""

from coconut.adaptive.main import main

if __name__ == "__main__":
    main()
