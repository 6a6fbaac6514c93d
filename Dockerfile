# A slim image for CPUs: docker build --build-arg PIP_INDEX_URL=INDEX -t simvq-moe .
# where INDEX has the CPU build of torch: the plain one on Linux brings gigabytes of CUDA. Then
# docker run --rm -v "$PWD/runs:/work/runs" simvq-moe train --config image_quickstart --name first
FROM python:3.12-slim
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
# DeepSpeed compiles an operator where a run of several processes starts
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git \
    && rm -rf /var/lib/apt/lists/*
COPY . /source
RUN pip install --no-cache-dir --constraint /source/constraints.txt "/source[train,report,image,demo]"
RUN useradd --create-home user && install --directory --owner user /work
USER user
WORKDIR /work
ENTRYPOINT ["simvq-moe"]
CMD ["--help"]
