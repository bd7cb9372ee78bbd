"""`python -m polar_deploy.surgery IN.onnx OUT.onnx`: the exact ONNX surgery on its own."""

import sys

from polar_deploy import cli

main = cli.alone("surgery", "polar_deploy.surgery")

if __name__ == "__main__":
    sys.exit(main())
