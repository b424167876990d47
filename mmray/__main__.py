"""``python -m mmray``: the same as the console command."""

from mmray.cli import main

if __name__ == "__main__":
    main()
