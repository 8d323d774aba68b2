# Training on a CPU: docker build -t ballbot . && docker run -v "$PWD/runs:/ballbot/runs" ballbot --preset tuned
FROM python:3.11-slim
WORKDIR /ballbot
COPY requirements.txt .
# PyTorch without CUDA is a tenth of the size
RUN pip install --no-cache-dir -r requirements.txt --extra-index-url https://download.pytorch.org/whl/cpu
COPY . .
ENTRYPOINT ["python", "ppo_ballbot.py"]
