"""What a person does with reports: `python -m polar_deploy.report view RUN`, `... compare RUN RUN`."""

import sys

from polar_deploy import cli

main = cli.alone("report", "polar_deploy.report")

if __name__ == "__main__":
    sys.exit(main())
