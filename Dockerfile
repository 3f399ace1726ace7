# The server alone, with the versions of requirements/ and the CPU build of torch:
#   docker build -t flserving .
#   docker run --rm --read-only --tmpfs /tmp --user "$(id -u):$(id -g)" -v "$PWD/models:/models:ro" \
#     -p 127.0.0.1:8000:8000 -p 127.0.0.1:8001:8001 flserving
# --user: a registry can be read by who published it, and nobody else. Options of `flserving serve` follow the image's
# name, or are variables (-e FLSERVING_WORKERS=2).
FROM python:3.11-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
RUN python -m venv --without-pip /venv
COPY requirements/server.txt requirements/torch.txt requirements/
RUN pip --python /venv install --require-hashes --no-deps -r requirements/server.txt
# PyTorch's own index knows the CPU builds, pip's own index has no hashes of them: taken by version, as run.py does
RUN pip --python /venv install --no-deps --extra-index-url https://download.pytorch.org/whl/cpu \
    "torch==$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' requirements/torch.txt)+cpu"
COPY pyproject.toml README.md LICENSE ./
COPY flserving flserving
RUN pip --python /venv install --no-deps --no-build-isolation .

FROM python:3.11-slim-bookworm
COPY --from=build /venv /venv
# The server writes to /tmp alone. It loads all of its bytecode from the image.
ENV PATH=/venv/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    FLSERVING_REGISTRY=/models FLSERVING_HOST=0.0.0.0
USER 65532:65532
EXPOSE 8000 8001
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s CMD ["python", "-c", \
    "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/v2/health/live', timeout=2)"]
ENTRYPOINT ["flserving", "serve"]
