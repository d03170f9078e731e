# Export on a PC without a GPU: trio-export, trio-inspect and trio-run. Run `make wheel` first, then build it from the repository's root.
FROM python:3.11-slim-bookworm
# PyPI's torch brings CUDA libraries of several GB, which an export does not use:
# --build-arg PIP_EXTRA_INDEX_URL=... and --build-arg TORCH=2.13.0+cpu take PyTorch's build for CPUs.
ARG PIP_EXTRA_INDEX_URL=
ARG TORCH=2.13.0
COPY dist/*.whl /wheels/
RUN pip install --no-cache-dir "torch==${TORCH}" "$(echo /wheels/*.whl)[export,ort]"
RUN useradd --create-home --uid 1000 trio && mkdir /bundles && chown trio /bundles
USER 1000
WORKDIR /bundles
VOLUME /bundles
ENTRYPOINT ["trio-export"]
