# docker build -t gigagpt .                                      for CPUs
# docker build -t gigagpt:cuda --build-arg BACKEND=cu130 .       for NVIDIA GPUs
# docker run --rm -it [--gpus all --ulimit memlock=-1 --shm-size 16g] -v "$PWD/runs:/runs" gigagpt \
#     python train.py configs/demo.yaml --out_dir /runs/demo
FROM python:3.11-slim
ARG BACKEND=cpu
# compilers: of C for Triton, of C++ for torch.compile on a CPU
RUN apt-get update && apt-get install -y --no-install-recommends git make gcc g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /gigagpt
COPY requirements.txt .
RUN pip install --no-cache-dir uv==0.13.9 \
    && uv pip install --system --no-cache --torch-backend "$BACKEND" -r requirements.txt
COPY . .
RUN python data/shakespeare_char/prepare.py
CMD ["python", "train.py", "--help"]
