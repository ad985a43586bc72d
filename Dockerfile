# For a CPU:     docker build -t lit-unlearn .
# For a GPU:     docker build -t lit-unlearn --build-arg TORCH=cu130 .
# Run a command: docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/work" lit-unlearn --help       (docs/running.md)
ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS build
# Which builds of torch: cpu, or those of a version of CUDA.
ARG TORCH=cpu
WORKDIR /source
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY lit_unlearn lit_unlearn
COPY configs configs
# torch first: without its own index, pip would take a build for CUDA.
RUN python -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir -c constraints.txt --extra-index-url "https://download.pytorch.org/whl/${TORCH}" torch \
    && /opt/venv/bin/pip install --no-cache-dir -c constraints.txt ".[gguf,sign]"

FROM python:${PYTHON}-slim
COPY --from=build /opt/venv /opt/venv
# The home of whoever runs it: with --user, what is written to a mounted folder belongs to you.
RUN mkdir -m 1777 /home/user /work
# Nothing is fetched unless the hub is switched on; torch asks for the user's name, which a number of --user lacks.
ENV PATH=/opt/venv/bin:$PATH HOME=/home/user USER=user HF_HUB_OFFLINE=1
USER 1000:1000
WORKDIR /work
ENTRYPOINT ["lit-unlearn"]
CMD ["--help"]
