# One image for every service. PyTorch's wheels bring their CUDA libraries, so the base needs none;
# the host needs NVIDIA's driver and container toolkit.
ARG PYTHON_IMAGE=python:3.12-slim-bookworm

# The dependencies alone, so that a change of code does not touch their 6 GB layer. Of requirements.txt
# only the pins are taken: the development tools stay out.
FROM ${PYTHON_IMAGE} AS dependencies
WORKDIR /src
COPY pyproject.toml requirements.txt ./
# The cache is a mount, which stays out of the layer.
# hadolint ignore=DL3042
RUN --mount=type=cache,target=/root/.cache \
    pip install uv==0.13.9 \
    && python -m venv /opt/venv \
    && VIRTUAL_ENV=/opt/venv uv pip install --link-mode copy --compile-bytecode \
       -r pyproject.toml --extra demo --extra probe --extra models -c requirements.txt

FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY storage storage
COPY workers workers
COPY producer producer
RUN --mount=type=cache,target=/root/.cache pip wheel --no-deps --wheel-dir /dist .

FROM ${PYTHON_IMAGE}
# Any user id may run the image (APP_UID in docker-compose.yml), so what a process writes to is open to all of them.
RUN useradd --create-home --uid 1000 halp \
    && chmod 1777 /home/halp \
    && install -d -m 1777 /data /model_cache
COPY --from=dependencies /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOME=/home/halp \
    USER=halp \
    HALP_CACHE_DIR=/model_cache \
    HF_HOME=/model_cache/huggingface \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist pip install --no-cache-dir --no-deps /dist/*.whl
USER 1000:1000
WORKDIR /data
CMD ["workers", "--help"]
