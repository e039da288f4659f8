# Image of Triptych: docker build -t triptych .    For GPUs: docker build --build-arg DEVICE=cuda -t triptych-cuda .
# The CUDA libraries come with PyTorch; the driver comes from the host.
FROM debian:bookworm-slim

SHELL ["/bin/bash", "-o", "errexit", "-o", "pipefail", "-c"]
# Pinned versions leave Debian's mirrors with each security update, and the image could not be built again.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates make python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

# cpu or cuda, and where pip looks for torch, as in `make install`.
ARG DEVICE=cpu
ARG TORCH_INDEX=
# NVIDIA_VISIBLE_DEVICES is left to the scheduler: `all` would show every GPU of a node to a container that asked for none.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility PIP_NO_CACHE_DIR=1
WORKDIR /opt/triptych
# First what changes seldom and is large: a change of the code then moves a small layer only.
COPY Makefile ./
RUN make torch DEVICE="$DEVICE" TORCH_INDEX="$TORCH_INDEX"
COPY . .
RUN make install DEVICE="$DEVICE" EXTRAS=
# TorchX starts `torchrun` by name.
ENV PATH=/opt/triptych/.venv/bin:$PATH

# Not root; give the number of whoever owns the shared storage: --build-arg USER_ID="$(id -u)".
ARG USER_ID=1000
RUN useradd --create-home --no-log-init --uid "$USER_ID" triptych
USER $USER_ID

# What run.json names: --build-arg TRIPTYCH_REVISION="$(git rev-parse HEAD)".
ARG TRIPTYCH_REVISION=
ENV TRIPTYCH_REVISION=$TRIPTYCH_REVISION
# No ENTRYPOINT: schedulers give the whole command, and some of them would run it as an entry point's arguments.
CMD ["triptych", "--help"]
