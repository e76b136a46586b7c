"""python -m coconut.rl"""

from coconut.rl.train import main

if __name__ == "__main__":
    main()
