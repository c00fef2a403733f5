# The image of every role: the job (its entrypoint), Dask's scheduler and Dask's workers.
#
#   docker build --tag sgclassify .
#
# Give pip a configuration file to use another package index, or a torch for CPUs only (several GB less). The file does
# not stay in the image:
#
#   docker build --secret id=pip,src=pip.conf --tag sgclassify .

FROM python:3.12-slim AS wheel
WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE constraints.txt ./
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

# The versions of an installation that has passed, so that the same sources give the same image. Binary packages only:
# the slim image has no compiler, so a package that needs one fails here.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    --mount=type=bind,from=wheel,source=/src/constraints.txt,target=/constraints.txt \
    pip install --no-cache-dir --only-binary=:all: --constraint /constraints.txt /wheels/*.whl

# A fixed user number, so that you can give this user the product folders; any other user works too. Dask's workers keep
# their files in /scratch. A container's root may be read-only: caches go to /tmp.
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin sgclassify \
    && install --directory --mode 1777 /scratch
ENV PYTHONSAFEPATH=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    MPLCONFIGDIR=/tmp/matplotlib
USER 10001:10001
WORKDIR /tmp

# No HEALTHCHECK: the default command is a batch job, whose exit code says how it went. The compose file checks the
# scheduler.
ENTRYPOINT ["sgclassify"]
CMD ["--help"]
