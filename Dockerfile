# The image of every role: the job (its entrypoint), Dask's scheduler and Dask's workers.
#
#   docker build --tag sgclassify .
#
# A site with a package index of its own, or that wants torch for CPUs only (several GB less), says so in a pip
# configuration file, which does not stay in the image:
#
#   docker build --secret id=pip,src=pip.conf --tag sgclassify .

FROM python:3.12-slim AS wheel
WORKDIR /src
COPY pyproject.toml setup.py README.md ./
COPY pipeline pipeline
COPY stages stages
COPY model model
COPY simulation simulation
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim
LABEL org.opencontainers.image.title="sgclassify" \
      org.opencontainers.image.description="Star/galaxy classification stage for CSST survey exposures" \
      org.opencontainers.image.licenses="Apache-2.0"

# Binary packages only: the slim image has no compiler, and a build that wants one had better say so at once.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir --only-binary=:all: /wheels/*.whl

# A fixed number, so that the folders of the products can be given to it; any other user does as well. /scratch is
# where Dask's workers keep their files. A container's root may be read-only: caches go to /tmp.
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin sgclassify \
    && install --directory --mode 1777 /scratch
ENV PYTHONSAFEPATH=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    MPLCONFIGDIR=/tmp/matplotlib
USER 10001:10001
WORKDIR /tmp

# No HEALTHCHECK: the image's own command is a batch job, whose exit code says how it went. The compose file checks
# the scheduler.
ENTRYPOINT ["sgclassify"]
CMD ["--help"]
