# The page of Reelsmith in a container, on an NVIDIA card: docs/rented.md. Without a card:
#   docker build --build-arg BASE=ubuntu:24.04 --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu -t reelsmith .
ARG BASE=nvidia/cuda:13.0.1-base-ubuntu24.04
FROM ${BASE}

# a compiler and Python's headers: torch.compile needs them. Their versions are those of the base image's system
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUTF8=1 PYTHONUNBUFFERED=1

# torch first, in a layer of its own: it is most of the download, and changes least
ARG TORCH_INDEX=https://download.pytorch.org/whl/cu130
RUN pip install --no-cache-dir torch==2.13.0 --index-url ${TORCH_INDEX}
COPY requirements.txt /opt/reelsmith/
RUN pip install --no-cache-dir -r /opt/reelsmith/requirements.txt
COPY . /opt/reelsmith/

# what stays: folders of clips with their runs, and models. Both belong to the user of the container
RUN install -d -o 1000 -g 1000 /data /models
VOLUME ["/data", "/models"]
USER 1000:1000
ENV HOME=/data
WORKDIR /data

EXPOSE 8765
# whether the page answers; without its word it refuses everybody, which is an answer too
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s \
    CMD ["python", "-c", "import socket; socket.create_connection(('127.0.0.1', 8765), 5).close()"]
ENTRYPOINT ["sh", "/opt/reelsmith/tools/start_page.sh"]
