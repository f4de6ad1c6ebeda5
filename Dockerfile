# lcl-adapter with its server and page. Without arguments this builds the CPU image. For a GPU:
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 --build-arg EXTRAS=page,bnb -t lcl-adapter:gpu .
FROM python:3.11-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=page

# At run time nothing is downloaded, and no usage data is sent.
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 GRADIO_ANALYTICS_ENABLED=False

WORKDIR /app
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY lcl_adapter ./lcl_adapter
COPY recipes ./recipes
# torch comes first, from its own index, at the version in constraints.txt.
RUN pip install --index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)" \
    && pip install -c constraints.txt ".[$EXTRAS]"

# The process does not run as root. The store is a volume.
RUN useradd --create-home --uid 10001 lcl && mkdir /data && chown lcl /data
USER lcl
WORKDIR /data
VOLUME /data
EXPOSE 8000
HEALTHCHECK --start-period=120s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=5)"]
ENTRYPOINT ["lcl-adapter"]
# A container must listen on all addresses, so it needs a key file. compose.yaml mounts keys.txt as that file.
CMD ["serve", "pocket", "--host", "0.0.0.0", "--api-key-file", "/run/secrets/keys", "--store", "/data/support-sets"]
