"""The same as `polar-deploy sweep`: `python -m polar_deploy.sweep FILE`."""

import sys

from polar_deploy import cli

main = cli.alone("sweep", "polar_deploy.sweep")

if __name__ == "__main__":
    sys.exit(main())
