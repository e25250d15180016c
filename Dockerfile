# CPU:  docker build -t sb3-flow .
# CUDA: docker build -t sb3-flow --build-arg PARENT_IMAGE=pytorch/pytorch:2.8.0-cuda12.8-cudnn9-runtime .
# Then: docker run --rm -it -v "$PWD/logs:/runs/logs" sb3-flow train --algo fpo --env HalfCheetah-v5
ARG PARENT_IMAGE=python:3.12-slim
FROM ${PARENT_IMAGE}

# What MuJoCo draws videos with where there is no screen
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libegl1 libgl1 libosmesa6 \
    && rm -rf /var/lib/apt/lists/*
ENV MUJOCO_GL=osmesa

COPY . /opt/sb3-flow
# PyTorch is that of the image, if it has one
RUN (python -c "import torch" || pip install --no-cache-dir torch==2.13.0) \
    && pip install --no-cache-dir "/opt/sb3-flow[mujoco,dmc,envpool,zoo,offline,plots,export]"

WORKDIR /runs
ENTRYPOINT ["sb3-flow"]
CMD ["--help"]
