# Dialect in a small image: a Python, a virtual environment, the code, nothing else.
#
#   docker build --tag dialect .
#   docker run --rm --volume dialect:/data --env SECRET_KEY dialect migrate
#   docker run --volume dialect:/data --env SECRET_KEY --publish 127.0.0.1:8000:8000 dialect
#
# compose.yaml does that with MySQL. docs/operations.md explains both.
# scripts/dockerfile.py knows the instructions used here, and runs them where there is no Docker.

FROM python:3.13-slim-trixie AS build

WORKDIR /app
RUN python -m venv /opt/venv

# Before the code, so that a change of the code installs nothing again. Wheels only, as there is no compiler here;
# pybloom-live is plain Python and published as source alone.
COPY requirements.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/venv/bin/python -m pip install --disable-pip-version-check --only-binary :all: \
        --no-binary pybloom-live -r requirements.txt \
    && /opt/venv/bin/python -m pip uninstall --yes pip

COPY alembic.ini ./
COPY alembic alembic
COPY app app
# The server may not write beside its code. By hash, because a copy may change the time of a file.
RUN /opt/venv/bin/python -m compileall -q --invalidation-mode unchecked-hash app alembic


FROM python:3.13-slim-trixie

LABEL org.opencontainers.image.title="Dialect" \
      org.opencontainers.image.description="A self-hosted messenger server" \
      org.opencontainers.image.version="1.0.0" \
      org.opencontainers.image.licenses="MIT"

# Numbers, so that orchestrators see that it is not root, and owners of volumes on the host can be given the same.
RUN groupadd --gid 10001 dialect \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /data --shell /usr/sbin/nologin dialect \
    && install --directory --owner 10001 --group 10001 --mode 0750 /data

# Owned by root: whoever breaks into the server cannot change its code.
COPY --from=build /opt/venv /opt/venv
COPY --from=build /app /app

ENV PATH=/opt/venv/bin:/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    ENVIRONMENT=production \
    LOG_FORMAT=json \
    PORT=8000 \
    SQLITE_PATH=/data/dialect.db \
    UPLOAD_PATH=/data/uploads

WORKDIR /app
USER 10001:10001
VOLUME ["/data"]
EXPOSE 8000

# The drain begins with it; what the process manager allows for it must be more than SHUTDOWN_SECONDS.
STOPSIGNAL SIGTERM

# Whether the process lives, not whether its database does: Swarm and others replace what is unhealthy, and a new
# server would not bring the database back. (It listens only once the database has answered, so the first success
# also says that it is ready.) Load balancers ask /health/ready.
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --start-interval=1s --retries=3 \
    CMD ["python", "-I", "-S", "-c", "import http.client, os; c = http.client.HTTPConnection('127.0.0.1', int(os.environ['PORT']), timeout=4); c.request('GET', '/health/live'); raise SystemExit(c.getresponse().status != 200)"]

# No shell between: the server itself hears the signal. `docker run dialect migrate` and `... check` replace `serve`.
# It does not migrate by itself: the running server needs no right to change tables, and refuses one that is not current.
ENTRYPOINT ["python", "-m", "app"]
CMD ["serve"]
