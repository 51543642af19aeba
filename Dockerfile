# CPU:  docker build -t gr .
# GPU:  docker build -t gr --build-arg DEVICE=cuda .        (run with --gpus all; the wheels of torch bring CUDA)
# An index for torch alone: --build-arg GR_TORCH_INDEX_URL=URL
ARG BASE=python:3.12-slim
FROM ${BASE}

# The operators are compiled where they run: C++ compiler and make stay in the image.
RUN apt-get update && apt-get install -y --no-install-recommends g++ git make && rm -rf /var/lib/apt/lists/*

WORKDIR /gr
ARG DEVICE=cpu
ARG GR_TORCH_INDEX_URL=

# Layers from what changes seldom to what changes often: torch, the other packages, the operators, gr.
COPY Makefile pyproject.toml ./
COPY launch/setup_environment.sh launch/
COPY gr/tested_set.txt gr/
RUN make .venv/.packages DEVICE=${DEVICE} GR_TORCH_INDEX_URL=${GR_TORCH_INDEX_URL}
COPY . .
RUN make setup DEVICE=${DEVICE} && .venv/bin/python launch/doctor.py

ENV PATH=/gr/.venv/bin:$PATH
CMD ["python", "launch/doctor.py"]
