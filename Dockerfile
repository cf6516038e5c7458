# clip-index with CUDA: docker run --gpus all -v "$PWD:/data" clip-index embed photos embeddings
FROM nvidia/cuda:12.6.3-runtime-ubuntu22.04

ENV DEBIAN_FRONTEND=noninteractive \
    PIP_NO_CACHE_DIR=1 \
    PATH=/opt/clip-index/bin:$PATH

# Ubuntu 22.04 has Python 3.10
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/clip-index

WORKDIR /src
COPY setup.cfg pyproject.toml constraints.txt README.md LICENSE NOTICE MANIFEST.in ./
COPY clip_index ./clip_index

# autofaiss depends on faiss-cpu, and faiss-gpu installs the same module: one has to go before the other comes.
RUN pip install --constraint constraints.txt '.[s3]' \
    && pip uninstall --yes faiss-cpu \
    && pip install --constraint constraints.txt 'faiss-gpu>=1.15'

RUN useradd --create-home --uid 1000 clip
USER clip
WORKDIR /data

ENTRYPOINT ["clip-index"]
CMD ["--help"]
