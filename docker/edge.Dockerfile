# Build, verify and run engines on the device: NVIDIA's TensorRT container, no PyTorch.
#
#   docker build -f docker/edge.Dockerfile -t polar-deploy:edge .
#   docker run --gpus all --rm polar-deploy:edge                 # what this device can build and run
#   docker run --gpus all --rm -v "$PWD":/work -w /work --entrypoint python3 polar-deploy:edge \
#       -m polar_deploy.bundle verify bundle --rebuild --engines here
#   docker run --gpus all --rm -v "$PWD":/work -w /work --entrypoint python3 polar-deploy:edge \
#       -m polar_deploy.pipeline --recipe runs/RUN/run.yaml --out runs/RUN --from build
#
# On a Jetson (JetPack 6.1 or later, TensorRT 10.3):  --build-arg BASE=nvcr.io/nvidia/l4t-tensorrt:r10.3.0-devel
ARG BASE=nvcr.io/nvidia/tensorrt:25.10-py3
FROM ${BASE}

COPY pyproject.toml README.md LICENSE /opt/polar-deploy/
COPY pipelines /opt/polar-deploy/pipelines
COPY examples /opt/polar-deploy/examples
COPY polar_deploy /opt/polar-deploy/polar_deploy
RUN python3 -m pip install --no-cache-dir '/opt/polar-deploy[trt]'

ENTRYPOINT ["python3", "-m", "polar_deploy.engines"]
CMD ["doctor"]
