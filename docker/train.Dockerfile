# Train, cut, build and prove: NVIDIA's PyTorch container, whose torch and tensorrt stay its own.
#
#   docker build -f docker/train.Dockerfile -t polar-deploy:train .
#   docker run --gpus all --ipc=host --rm -it -v "$PWD":/work -w /work polar-deploy:train \
#       --model resnet56 --data-dir data --target trt-fp16
#
# What it can build and run:  docker run --gpus all --rm --entrypoint python polar-deploy:train -m polar_deploy.engines doctor
ARG BASE=nvcr.io/nvidia/pytorch:25.12-py3
FROM ${BASE}

COPY pyproject.toml README.md LICENSE /opt/polar-deploy/
COPY pipelines /opt/polar-deploy/pipelines
COPY examples /opt/polar-deploy/examples
COPY polar_deploy /opt/polar-deploy/polar_deploy
# The container holds its own packages to their versions by PIP_CONSTRAINT: what is there is not installed again.
RUN pip install --no-cache-dir '/opt/polar-deploy[train,trt]'

ENTRYPOINT ["python", "-m", "polar_deploy.pipeline"]
CMD ["--help"]
