# lcl-adapter with its server and page. The CPU image by default; for a GPU:
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 --build-arg EXTRAS=page,bnb -t lcl-adapter:gpu .
FROM python:3.11-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=page

# Nothing is fetched, and nothing is told, while it runs.
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 GRADIO_ANALYTICS_ENABLED=False

WORKDIR /app
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY lcl_adapter ./lcl_adapter
COPY recipes ./recipes
# torch first, from its own index, at the version that the constraints name.
RUN pip install --index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)" \
    && pip install -c constraints.txt ".[$EXTRAS]"

# Not root; the store is a volume of its own.
RUN useradd --create-home --uid 10001 lcl && mkdir /data && chown lcl /data
USER lcl
WORKDIR /data
VOLUME /data
EXPOSE 8000
HEALTHCHECK --start-period=120s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=5)"]
ENTRYPOINT ["lcl-adapter"]
# Others reach a container only by its network, so a key file is needed: compose.yaml mounts one.
CMD ["serve", "pocket", "--host", "0.0.0.0", "--api-key-file", "/run/secrets/keys", "--store", "/data/support-sets"]
