# An image with Lockstep for `lockstep render rayjob` and `compose`: docker build --tag lockstep .
# What is installed, and how, is in the Makefile.
ARG BASE=python:3.12-slim-bookworm
FROM ${BASE}

# A C compiler builds one of the packages and the loops of rollouts on a CPU; KubeRay's probes use wget.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc g++ libc6-dev make wget \
    && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1
WORKDIR /opt/lockstep
COPY Makefile pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
COPY data data
COPY distributed distributed
COPY model model
COPY rl rl
COPY cluster cluster
COPY recipes recipes
RUN make VENV=/opt/venv /opt/venv/installed
