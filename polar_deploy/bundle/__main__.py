"""What an edge team does with a bundle: `python -m polar_deploy.bundle verify DIR`, `... run`, `... triton`."""

import sys

from polar_deploy import cli

main = cli.alone("bundle", "polar_deploy.bundle")

if __name__ == "__main__":
    sys.exit(main())
