# One file, two images:
#   docker build --target coordinator -t raflora-coordinator .     the server and the command line, without torch
#   docker build --target worker      -t raflora-worker .          the same plus torch, transformers and PEFT
#
# TORCH is what pip installs as torch, TORCH_INDEX the package index it comes from (unset: pip's own), for
# a build of torch that fits your driver or that has no CUDA at all. MORE names further packages of the worker, such as
# bitsandbytes for 4-bit base models.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

# --- what is common: a virtual environment with the coordinator's dependencies
FROM ${PYTHON_IMAGE} AS dependencies
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/raflora/bin:$PATH
WORKDIR /source
COPY pyproject.toml constraints.txt ./
RUN python3 -m venv /opt/raflora \
    && pip install --quiet --upgrade --constraint constraints.txt pip \
    && python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > /tmp/requirements.txt \
    && pip install --quiet --constraint constraints.txt --requirement /tmp/requirements.txt

# --- the project itself, in a stage of its own so that a change of code keeps the layers above
FROM dependencies AS coordinator-build
COPY README.md LICENSE ./
COPY proto proto
COPY common common
COPY coordinator coordinator
COPY worker worker
COPY simulation simulation
COPY cli cli
RUN pip install --quiet --no-deps . && pip uninstall --quiet --yes pip setuptools

FROM ${PYTHON_IMAGE} AS base
ENV PATH=/opt/raflora/bin:$PATH PYTHONUNBUFFERED=1
RUN groupadd --gid 10001 raflora \
    && useradd --uid 10001 --gid raflora --create-home --shell /usr/sbin/nologin raflora \
    && install --directory --owner raflora --group raflora /state /adapter /join
USER raflora
WORKDIR /state
VOLUME ["/state"]
ENTRYPOINT ["raflora"]

FROM base AS coordinator
COPY --from=coordinator-build /opt/raflora /opt/raflora
EXPOSE 7070
HEALTHCHECK --interval=10s --timeout=10s --start-period=30s --retries=3 CMD ["raflora", "health"]
CMD ["coordinator", "--config", "/etc/raflora/federation.toml"]

# --- the worker: torch first and alone, then the rest without letting pip choose another torch
FROM dependencies AS worker-dependencies
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=
RUN pip install --quiet ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$TORCH"
RUN grep -v '^torch==' constraints.txt > /tmp/constraints.txt \
    && python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['worker'], sep='\n')" > /tmp/requirements.txt \
    && pip install --quiet --constraint /tmp/constraints.txt --requirement /tmp/requirements.txt scikit-learn
ARG MORE=
RUN test -z "$MORE" || pip install --quiet --constraint /tmp/constraints.txt $MORE

FROM worker-dependencies AS worker-build
COPY --from=coordinator-build /source /source
RUN pip install --quiet --no-deps . && pip uninstall --quiet --yes pip

FROM base AS worker
COPY --from=worker-build /opt/raflora /opt/raflora
ENV HF_HOME=/state/huggingface
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s --retries=3 CMD ["raflora", "health", "--worker", "/state/worker-state"]
CMD ["worker", "--config", "/etc/raflora/worker.toml"]
