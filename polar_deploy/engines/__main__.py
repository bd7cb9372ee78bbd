"""The commands around engines: `python -m polar_deploy.engines doctor`, `... table`."""

import sys

from polar_deploy import cli

main = cli.alone("engines", "polar_deploy.engines")

if __name__ == "__main__":
    sys.exit(main())
