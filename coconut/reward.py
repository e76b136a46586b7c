"""The command that trains a reward model: coconut.rewards.train."""

from coconut.rewards.train import main

if __name__ == "__main__":
    main()
