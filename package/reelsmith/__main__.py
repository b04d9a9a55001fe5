"""Run `python -m reelsmith` as the command `reelsmith`."""

from package.reelsmith.commands import main

if __name__ == "__main__":
    main()
