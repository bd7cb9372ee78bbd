"""`python -m polar_deploy`: the same as `polar-deploy`."""

import sys

from polar_deploy.cli import main

if __name__ == "__main__":
    sys.exit(main())
