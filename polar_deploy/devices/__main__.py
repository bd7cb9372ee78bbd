"""The commands around devices: `python -m polar_deploy.devices list`, `... show NAME`, `... measure`."""

import sys

from polar_deploy import cli

main = cli.alone("devices", "polar_deploy.devices")

if __name__ == "__main__":
    sys.exit(main())
