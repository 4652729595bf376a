import sys

from kvcache.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
