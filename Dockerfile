# clip-cid for a machine with an NVIDIA GPU, its driver (580 or newer) and NVIDIA's container toolkit.
# It was never built: no Docker was at hand. tests/unit/test_dockerfile.py checks that what it names exists.
#
#     docker build -t clip-cid .
#     docker run --rm --gpus all --shm-size 16g --user "$(id -u):$(id -g)" -v "$PWD:/work" clip-cid run runs/mine --recipe mine.yaml
#
#     docker build -t clip-cid-check --target check .
#     docker run --rm --gpus all --shm-size 16g -v "$PWD/runs:/opt/clip-cid/runs" clip-cid-check
#
# torch comes from pip's default index. Its wheels for Linux are built for CUDA (torch 2.15.0 of constraints.txt for
# CUDA 13.2) and bring CUDA's libraries, NCCL and Triton as packages of their own. So the base image needs no CUDA.
# It is the full one, not `slim`, for its C compiler: Triton calls it when it first runs a kernel.
FROM python:3.12 AS base
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility PIP_NO_CACHE_DIR=1
WORKDIR /opt/clip-cid

# `make device-check`, with the developer tools and the tests.
FROM base AS check
COPY . .
RUN make setup
CMD ["make", "device-check"]

# The command, for any user; what it caches goes with the container.
FROM base AS clip-cid
COPY pyproject.toml setup.py constraints.txt README.md LICENSE ./
COPY src src
RUN pip install -c constraints.txt '.[all]'
ENV HOME=/tmp
WORKDIR /work
ENTRYPOINT ["clip-cid"]
CMD ["--help"]
