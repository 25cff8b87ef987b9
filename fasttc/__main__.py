"""``python -m fasttc`` and ``torchrun -m fasttc``: the command line."""

from fasttc.cli.__main__ import main

if __name__ == "__main__":
    main()
