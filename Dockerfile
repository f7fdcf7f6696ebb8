# ngpt on a node with NVIDIA GPUs:
#   docker build --tag ngpt --build-arg GIT_COMMIT="$(git rev-parse HEAD)" .
#   bash launch/docker.sh experiment=c4_60m_natural_galore tokenizer.path=spiece.model
#
# The base is CUDA's smallest image: torch's own packages bring the CUDA 13.0 libraries, cuDNN and NCCL, so a `runtime` image would
# hold them twice. What the base adds is its check of the host's driver. Kernels that DeepSpeed compiles itself need `devel` instead.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

# gcc and Python's headers are what torch.compile needs. Versions are those of the pinned distribution, which drops old ones.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1001 ngpt

WORKDIR /ngpt
ENV PATH=/venv/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1

# The packages change seldom and weigh gigabytes, so their layer depends on the pins alone and not on the code.
COPY pyproject.toml constraints.txt ./
COPY .ci/install.sh .ci/hashes.py .ci/hashes.txt .ci/
RUN mkdir ngpt \
    && touch README.md LICENSE ngpt/__init__.py \
    && TORCH=cuda bash .ci/install.sh /venv

COPY . .
# The manifest of a run names the commit; the image holds no history to read it from.
ARG GIT_COMMIT
ENV NGPT_COMMIT=$GIT_COMMIT
RUN install --directory --owner 1001 runs

USER 1001
# No entry point: `docker run ngpt torchrun --standalone -m ngpt.train ...` works as well as `python -m ngpt.train ...`.
ENTRYPOINT []
CMD ["python", "-m", "ngpt.train", "--help"]
