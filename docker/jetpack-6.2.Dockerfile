# The runtime on a Jetson with JetPack 6.2: trio-check, trio-build, trio-run, trio-watch and trio-profile, without torch. Run `make wheel` on the PC
# first, copy dist/ and docker/ to the Jetson, build it there from their folder, and run it with `--runtime nvidia`.
ARG BASE=nvcr.io/nvidia/l4t-jetpack:r36.4.0
FROM ${BASE}
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# TensorRT's module is made for the system's Python, 3.10. Versions are those of the base image's JetPack.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-libnvinfer python3-pip python3-venv \
    && rm -rf /var/lib/apt/lists/*
COPY dist/*.whl /wheels/
ENV PATH=/opt/trio/bin:$PATH
# [video] reads cameras for trio-watch. cuda-python must not be newer than the driver's CUDA, 12.6.
RUN python3 -m venv --system-site-packages /opt/trio \
    && pip install --no-cache-dir "$(echo /wheels/*.whl)[gpu,video]" "cuda-python==12.6.2.post1"
RUN useradd --create-home --uid 1000 --groups video trio && mkdir /bundles && chown trio /bundles
USER 1000
WORKDIR /bundles
VOLUME /bundles
CMD ["trio-check"]
