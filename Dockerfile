# For NVIDIA GPUs: megagrok in NVIDIA's PyTorch container, which brings torch, NCCL, Transformer Engine and Apex that fit
# each other. On a CPU use `make setup` instead.
#   docker build -t megagrok . && docker run --gpus all --ipc=host -v "$PWD/runs:/megagrok/runs" megagrok check configs/run/quickstart.yaml
FROM nvcr.io/nvidia/pytorch:25.12-py3

WORKDIR /megagrok
COPY . .
# The container pins its own packages through PIP_CONSTRAINT; without build isolation DeepSpeed builds against its torch.
RUN DS_BUILD_OPS=0 pip install --no-cache-dir --no-build-isolation -e '.[gpu]'

ENTRYPOINT ["megagrok"]
