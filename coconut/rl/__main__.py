"""python -m coconut.rl"""

from coconut.rl.trainer import main

if __name__ == "__main__":
    main()
