# editkit with the tested versions. CPU by default; a CUDA base image and torch's CUDA build:
#   docker build --build-arg BASE=nvidia/cuda:12.8.1-runtime-ubuntu24.04 --build-arg TORCH_INDEX= -t editkit .
ARG BASE=ubuntu:24.04
FROM ${BASE}

# An index with torch for the CPU alone; empty: pip's choice, which on Linux is the CUDA build.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/editkit
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

# torch first: the largest layer stays the same while editkit changes.
COPY constraints.txt ./
RUN pip install ${TORCH_INDEX:+--extra-index-url ${TORCH_INDEX}} -c constraints.txt torch

COPY . .
RUN pip install ${TORCH_INDEX:+--extra-index-url ${TORCH_INDEX}} -c constraints.txt \
    '.[tasks,gguf,peft,report]'

# Runs, statistics and the hub's files go to a volume: docker run -v "$PWD:/runs" editkit run ...
ENV EDITKIT_CACHE=/runs/.cache/editkit \
    HF_HOME=/runs/.cache/huggingface
WORKDIR /runs
ENTRYPOINT ["editkit"]
CMD ["--help"]
