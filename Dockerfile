# Training on a CPU: docker build -t ballbot . && docker run -v "$PWD/runs:/ballbot/runs" ballbot --preset tuned
FROM python:3.11-slim
WORKDIR /ballbot
COPY requirements.txt .
# The address of PyTorch's index of builds without CUDA, a tenth of the size: --build-arg PIP_EXTRA_INDEX_URL=...
ARG PIP_EXTRA_INDEX_URL
RUN pip install --no-cache-dir -r requirements.txt
COPY . .
ENTRYPOINT ["python", "ppo_ballbot.py"]
