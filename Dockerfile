# Container image with alexprep, alexstream and alextrain. The volume /data holds photographs, stores and run folders:
#
#   docker build --tag alexnet .
#   docker run --rm --init --volume "$PWD:/data" --user "$(id -u):$(id -g)" alexnet alexprep build-lmdb photographs
#
#   docker build --tag alexnet:cuda13 --build-arg VARIANT=cuda13 .
#   docker run --rm --init --gpus all --volume "$PWD:/data" --user "$(id -u):$(id -g)" alexnet:cuda13 alextrain run
#
# VARIANT=cpu, the default, makes an image that contains no compiler and cannot use a GPU. VARIANT=cuda13 makes an image
# that needs a driver for CUDA 13 and NVIDIA's container toolkit.
#
# For Linux, PyPI has only the CUDA build of torch. The CUDA build also runs on a CPU, but makes the CPU image 6 GB
# large. For a smaller image, add --build-arg PIP_EXTRA_INDEX_URL=URL, where URL is the address of a package index with
# CPU builds of torch. If both indexes have the same version of torch, pip prefers the CPU build.

ARG PYTHON=3.13
ARG VARIANT=cpu

FROM python:${PYTHON}-slim-trixie AS build
ARG PIP_EXTRA_INDEX_URL=""
ENV PIP_CACHE_DIR=/var/cache/pip \
    PIP_DISABLE_PIP_VERSION_CHECK=1
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY tools/compile_native.py tools/
COPY prep prep/
COPY pipeline pipeline/
COPY train train/
# The extra cuda13 installs DALI, which also runs on a CPU. The build fails at `test` if a kernels.c was not compiled.
RUN --mount=type=cache,target=/var/cache/pip \
    python -m venv /opt/alexnet \
    && /opt/alexnet/bin/python -m pip install --constraint constraints.txt '.[cuda13,export,figures,tensorboard]' \
    && test "$(find prep pipeline train -name kernels.c -printf .)" \
          = "$(find /opt/alexnet -name 'kernels-*.so' -printf .)"

FROM python:${PYTHON}-slim-trixie AS runtime-cpu
LABEL org.opencontainers.image.title="alexnet" \
      org.opencontainers.image.description="Photographs in, a trained AlexNet out" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
# Triton and matplotlib keep caches in /home/alexnet. `docker run --user` may name any user, so every user may write
# to this folder.
RUN useradd --uid 10001 --user-group --create-home --no-log-init alexnet \
    && chmod 1777 /home/alexnet \
    && install --directory --owner=10001 --group=10001 /data
COPY --from=build /opt/alexnet /opt/alexnet
ENV HOME=/home/alexnet \
    PATH="/opt/alexnet/bin:${PATH}"
WORKDIR /data

# Triton needs a C compiler: when a kernel first runs, Triton compiles the code that launches the kernel.
FROM runtime-cpu AS runtime-cuda13
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

# hadolint ignore=DL3006
FROM runtime-${VARIANT}
USER 10001:10001
HEALTHCHECK --interval=60s --timeout=10s CMD ["alexprep", "--version"]
# The image has no entry point, so begin the container's command line with alexprep, alexstream or alextrain.
CMD ["alexprep", "--help"]
